"""Checkpoints of a run (Orbax), and variables in one file (safetensors)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import safetensors.flax

from granq_jax.distill.trainer import AVERAGE
from granq_jax.errors import InputError, RunError
from granq_jax.files.tensor_files import joined
from granq_jax.files.writing import write_bytes
from granq_jax.quant import RANGES
from granq_jax.runs import names
from granq_jax.runtime.paths import expanded
from granq_jax.runtime.processes import from_first, is_first

_LOGGER = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A checkpoint: its step, the state, and what was noted beside it."""

    step: int
    state: Any
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in ``workdir/checkpoints``.

    Each holds a digest of all that is in it, and is used only if that is still right. Of several
    processes, the first reads and writes; the others are given what it reads, and must call as it does.

    Attributes:
      kept_steps: steps whose checkpoints are kept beside the newest ones; set by the caller.
    """

    def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False):
        """Opens them.

        Args:
          workdir: of the run.
          keep: how many of the newest are kept.
          read_only: whether files are left as they are, by a process that does not own the run.
        """
        self.kept_steps: frozenset[int] = frozenset()
        self._keep = keep
        self._read_only = read_only
        self._directory = (expanded(workdir, "workdir") / names.CHECKPOINTS).absolute()
        self._manager: Any = None
        if not is_first():
            return
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
        import orbax.checkpoint as ocp  # here: it takes 0.1 s, which who keeps no checkpoints need not wait for

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
                create=False,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                cleanup_tmp_directories=not read_only,  # of a process that was killed
                preservation_policy=self,
            ),
        )

    def save(self, step: int, state: Any, notes: Mapping[str, Any] | None = None) -> None:
        """Copies ``state``, a pytree, as of ``step``, and writes it in the background.

        Nothing happens if there is a checkpoint of that step.

        Args:
          step: at least that of the newest checkpoint.
          state: a pytree of arrays.
          notes: anything that JSON can hold, kept beside it.

        Raises:
          RunError: if this one or the one before could not be written.
        """
        if self._manager is None or step in self._manager.all_steps():
            return
        # Copies: the arrays of a state may be donated to the next step while they are being written.
        arrays = jax.tree.map(np.array, jax.device_get(flax.serialization.to_state_dict(state)))
        notes = dict(notes or {})
        record = {"notes": notes, "sha256": _digest(arrays, notes)}
        self._guarded(
            "save",
            step,
            args=self._args.Composite(state=self._args.StandardSave(arrays), record=self._args.JsonSave(record)),
        )

    def check(self) -> None:
        """Raises :class:`RunError` if it is known by now that a checkpoint could not be written."""
        self._guarded("check_for_errors")

    def wait(self) -> None:
        """Waits for what is being written; raises :class:`RunError` if that fails."""
        self._guarded("wait_until_finished")

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, whole or damaged; ``None`` if there is none."""
        return None if self._manager is None else self._manager.latest_step()

    def newest(self, like: Any, *others: Any) -> Saved | None:
        """The newest checkpoint that is whole; ``None`` if there is none at all.

        Newer ones that are damaged are reported, and moved to ``STEP.damaged``. What cannot be read for
        another reason, which may pass, is neither moved nor passed over.

        Args:
          like: a pytree of the structure, shapes and dtypes of the state.
          *others: further ones that it may have instead.

        Raises:
          RunError: if all checkpoints are damaged, or the system fails to read one.
        """
        likes = (like, *others)
        found = from_first(lambda: self._newest([flax.serialization.to_state_dict(like) for like in likes]))
        if found is None:
            return None
        state = flax.serialization.from_state_dict(likes[found["like"]], found["state"])
        return Saved(found["step"], state, found["notes"])

    def of_step(self, step: int, like: Any, *others: Any) -> Saved:
        """The checkpoint of ``step``; see :meth:`newest`.

        Raises:
          RunError: if there is none that is whole.
        """
        likes = (like, *others)

        def read():
            try:
                return self._read_with_patience(step, [flax.serialization.to_state_dict(like) for like in likes])
            except Exception as error:  # damage can show in any way
                raise RunError(
                    f"workdir: the checkpoint of step {step} in {str(self._directory)!r} cannot be read: "
                    f"{_one_line(error)}"
                ) from error

        found = from_first(read)
        return Saved(step, flax.serialization.from_state_dict(likes[found["like"]], found["state"]), found["notes"])

    def _newest(self, likes: Sequence[Any]) -> dict[str, Any] | None:
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read_with_patience(step, likes)
            except Exception as error:  # damage can show in any way
                if _may_pass(error):
                    raise RunError(
                        f"workdir: the checkpoint of step {step} in {str(self._directory)!r} cannot be read: "
                        f"{_one_line(error)}; it may be whole, and is left where it is: try again"
                    ) from error
                damaged[step] = error
                _LOGGER.warning(
                    "checkpoint of step %d in %r is damaged, the one before it is used: %s",
                    step,
                    str(self._directory),
                    _one_line(error),
                )
                continue
            self._move_aside(damaged)
            return found
        if damaged:
            raise RunError(
                f"workdir: all checkpoints in {str(self._directory)!r} are damaged ({', '.join(map(str, damaged))}); "
                "put whole ones there, or start anew with --overwrite"
            )
        return None

    def close(self) -> None:
        """Waits for what is being written; raises :class:`RunError` if that fails."""
        self._guarded("close")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RunError:
            if exception_type is None:  # otherwise the first reason is the one to tell
                raise

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax asks which of ``checkpoints``, the oldest first, are to be kept."""
        newest = len(checkpoints) - self._keep
        return [i >= newest or checkpoint.step in self.kept_steps for i, checkpoint in enumerate(checkpoints)]

    def _read_with_patience(self, step: int, likes: Sequence[Any]) -> dict[str, Any]:
        """What is found of ``step`` with the first of ``likes`` that fits, in one of two attempts."""
        errors: list[Exception] = []
        for _ in range(2):
            for number, like in enumerate(likes):
                target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
                try:
                    state, notes = self._read(step, target)
                except Exception as error:  # of any kind, for whoever asked to judge
                    errors.append(error)
                else:
                    return {"step": step, "state": state, "notes": notes, "like": number}
        raise next(filter(_may_pass, errors), errors[0])

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return self._read_as(step, target)
        except Exception:
            if not isinstance(target, dict) or not _FORMERLY.keys() & target.get("student", {}).keys():
                raise
            with contextlib.suppress(Exception):  # then the first reason is the one to tell
                arrays, notes = self._read_as(step, _renamed(target, _FORMERLY))
                return _renamed(arrays, {former: name for name, former in _FORMERLY.items()}), notes
            raise

    def _read_as(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        items = self._args.Composite(state=self._args.StandardRestore(target), record=self._args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        record = restored.record
        if record["sha256"] != _digest(restored.state, record["notes"]):
            raise InputError("its content is not what was written")
        return restored.state, record["notes"]

    def _move_aside(self, steps: Mapping[int, Exception]) -> None:
        if self._read_only or not steps:
            return
        for step in steps:
            aside = self._directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self._directory / str(step), aside)
        self._manager.reload()

    def _guarded(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._manager is None:
            return
        try:
            getattr(self._manager, method)(*args, **kwargs)
        except Exception as error:  # the file system's errors come out of Orbax in many types
            raise RunError(
                f"a checkpoint could not be written to {str(self._directory)!r}: {_one_line(error)}"
            ) from error


# What collections of a student were called by earlier versions, in whose checkpoints they still are.
_FORMERLY = {RANGES: "ranges", AVERAGE: "average"}


def _renamed(state: dict[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    student = {new_names.get(name, name): collection for name, collection in state["student"].items()}
    return {**state, "student": student}


def _digest(arrays: Any, notes: Mapping[str, Any]) -> str:
    sha256 = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(arrays):
        sha256.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha256.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def digest(variables: Any) -> str:
    """SHA-256 of a pytree's names, dtypes, shapes and values.

    Examples:
      >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
      True
    """
    return _digest(jax.device_get(variables), {})


def _may_pass(error: BaseException | None) -> bool:
    """Whether a failure to read says nothing of what is there: of memory, permissions, a network's file system."""
    if error is None:
        return False
    numbers = [int(number) for number in re.findall(r"OS error (\d+)", str(error))]  # as TensorStore tells them
    if any(number not in _OF_DAMAGE for number in numbers) or isinstance(error, MemoryError):
        return True
    of_system = isinstance(error, OSError) and not isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError
    )
    return of_system or _may_pass(error.__cause__ or error.__context__)


_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


def _one_line(error: Exception) -> str:
    """The operating system's reason where the message holds one, and otherwise its beginning."""
    text = " ".join(str(error).split()) or type(error).__name__
    reason = re.search(r"No space left on device|File too large|Disk quota exceeded|Read-only file system", text)
    return reason[0] if reason else text[:300]


def save_variables(path: str | Path, variables: Any) -> None:
    """Writes Flax variables to a ``.safetensors`` file, under ``/``-joined names, whole or not at all.

    Of several processes, the first does so.
    """
    tensors = {joined(keys): leaf for keys, leaf in flax.traverse_util.flatten_dict(variables).items()}
    write_bytes(expanded(path, "path"), safetensors.flax.save(tensors))
