"""The directory of a run: who may use it, and whether the run in it may go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from ml_collections import ConfigDict

from granq_jax.config import TRAIN_A_TEACHER, flat, load_config
from granq_jax.errors import InputError
from granq_jax.files.writing import write_json
from granq_jax.runs import names
from granq_jax.runs.record import check_writable
from granq_jax.runtime.processes import is_first, together

# In the order in which they are removed: should that be broken off, config.json still says whose they are.
_OWN_FILES = (
    *(
        names.RESULT,
        names.REPORT,
        names.METRICS,
        names.EVENTS,
        names.CHECKPOINTS,
        names.HELD_OUT,
        names.EVALUATION,
        names.TRACES,
        names.PROFILE,
        names.EXPORT,
    ),
    *(names.STARTS, names.CONFIG),
)

# Settings that a run may go on with when they have changed: they say how long it lasts, what is
# written and kept, and where inputs lie. Whether a teacher is still the same one is seen by its weights.
MAY_CHANGE = frozenset(
    {
        *("epochs", "resume", "on_nonfinite", "on_breakdown", "data_dir", "teacher"),
        *("eval_every_epochs", "checkpoint_every_epochs", "log_every_steps", "keep_checkpoints", "keep_best"),
        *("profile.start", "profile.steps"),
    }
)


def check_workdir(config: ConfigDict, workdir: Path, overwrite: bool = False) -> None:
    """Raises an ``InputError`` unless a run with ``config`` may begin or go on in ``workdir``; writes nothing."""
    check_writable(workdir)
    if overwrite:
        _check_own(workdir)
        return
    if not (workdir / names.CONFIG).exists():
        # Without a checkpoint in it, checkpoints/ may be of a run that was killed before it began.
        remains = [name for name in (names.METRICS, names.RESULT) if (workdir / name).exists()]
        remains += [f"{names.CHECKPOINTS}/{path.name}" for path in (workdir / names.CHECKPOINTS).glob("[0-9]*")]
        if remains:
            raise InputError(
                f"workdir: {str(workdir)!r} holds {', '.join(remains)} of a run but no {names.CONFIG}; "
                "give another one, or move them away"
            )
        return
    if not config.resume:
        raise InputError(
            f"workdir: {str(workdir)!r} already holds a run and config.resume is False; "
            "give another one, or replace the run with --overwrite"
        )
    begun, asked = (dict(flat(c)) for c in (load_config(workdir / names.CONFIG), config))
    for key in asked:
        fixed = key not in MAY_CHANGE or (key == "epochs" and config.student.schedule == "cosine")  # ends with them
        if fixed and begun[key] != asked[key]:
            raise InputError(
                f"config.{key}: got {asked[key]!r}, but the run in {str(workdir)!r} was begun with {begun[key]!r}, and "
                f"it can go on with that only; give another --workdir, or replace the run with --overwrite"
            )
    ended, has_checkpoints = (workdir / names.RESULT).exists(), any((workdir / names.CHECKPOINTS).glob("[0-9]*"))
    if ended and not has_checkpoints and finished_result(config, workdir) is None:
        raise InputError(
            f"workdir: {str(workdir)!r} holds {names.RESULT} of a run but no checkpoint to go on from; "
            "give another one, or replace the run with --overwrite"
        )


def _check_own(workdir: Path) -> None:
    """Raises an ``InputError`` if what is named as a run's files seems not to be written by one."""
    others = [name for name in _OWN_FILES if name != names.EVALUATION]  # which may be a teacher's
    there = [name for name in others if os.path.isfile(workdir / name) or any((workdir / name).glob("*"))]
    if there and not _is_of_run(workdir):
        raise InputError(
            f"workdir: {str(workdir)!r} holds {', '.join(there)}, but nothing says that a run wrote it; "
            "give another one, or move it away"
        )


def _is_of_run(workdir: Path) -> bool:
    """Whether ``config.json`` or, should that be damaged, ``starts.jsonl`` in ``workdir`` is as a run writes it.

    A lock says nothing: other programs name theirs so, too.
    """
    with contextlib.suppress(ValueError):
        load_config(workdir / names.CONFIG)
        return True
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        first = json.loads((workdir / names.STARTS).read_text().splitlines()[0])
        return "granq-jax" in first["versions"]
    return False


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes ``workdir`` and holds it for this process; the lock ends with the process, however that ends.

    If the input proves to be wrong and nothing was written, nothing is left. Of several processes, the first
    holds it for all.

    Raises:
      InputError: if another process holds it.
    """
    with contextlib.ExitStack() as held:
        with together():
            if is_first():
                held.enter_context(_locked_here(workdir))
        yield


@contextlib.contextmanager
def _locked_here(workdir: Path) -> Iterator[None]:
    missing = [path for path in (workdir, *workdir.absolute().parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    lock_is_new = not (workdir / names.LOCK).exists()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(workdir / names.LOCK, blocking=False))
        except filelock.Timeout:
            holder = ""
            with contextlib.suppress(OSError):  # Windows lets nobody else read it
                holder = (workdir / names.LOCK).read_text().strip()
            raise InputError(
                f"workdir: {str(workdir)!r} is in use by {holder or 'another process'}; "
                "wait until it ends, or give another one"
            ) from None
        with contextlib.suppress(PermissionError):  # nor write to it
            (workdir / names.LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        except InputError:
            if lock_is_new and not (workdir / names.CONFIG).exists():
                (workdir / names.LOCK).unlink()
                with contextlib.suppress(OSError):  # there is something in it
                    for path in missing:
                        path.rmdir()
            raise


def teacher_is_of_run(workdir: Path) -> bool:
    """Whether the teacher in ``workdir`` was trained by the run there, not by ``--mode train_teacher``."""
    if not (workdir / names.TEACHER_RESULT).exists():
        with contextlib.suppress(ValueError):  # no run there, or a damaged one
            return load_config(workdir / names.CONFIG).teacher == TRAIN_A_TEACHER
    return False


def remove_run(workdir: Path, and_teacher: bool) -> None:
    """Removes what a run has written to ``workdir``, and nothing else.

    Args:
      workdir: of the run.
      and_teacher: whether to remove the teacher that it trained, too.
    """
    for name in (*((names.TRAINED_TEACHER, names.TEACHER_TRAINING) if and_teacher else ()), *_OWN_FILES):
        path = workdir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def finished_result(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """The result of the run in ``workdir`` if it has taken all its steps, with this teacher; ``None`` otherwise."""
    # None there, or a damaged one: it is written again.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        result = json.loads((workdir / names.RESULT).read_text())
        # Whether a teacher elsewhere is the same one, its weights have to tell.
        # One that ended early has not taken them all.
        broke_down = config.on_breakdown == "stop" and result["steps"] == result.get("broke_down_after")
        ended = result["steps"] == config.epochs * config.steps_per_epoch or broke_down
        if ended and result["teacher"] == config.teacher:
            return result
    return None


def note_config(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``, with which the run in ``workdir`` begins or goes on."""
    if is_first():
        (workdir / names.RESULT).unlink(missing_ok=True)  # of a shorter run
    write_json(workdir / names.CONFIG, config.to_dict())
