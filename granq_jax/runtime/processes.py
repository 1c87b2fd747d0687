"""Several processes that train together, on one machine or many.

All run the same program on the same settings; process 0 alone reads and writes a run's files. With
one process everything here does nothing at the cost of nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import flax.serialization
import jax
import numpy as np
from jax.experimental import multihost_utils

from granq_jax.errors import InputError, RunError
from granq_jax.runtime.stopping import Interrupted, Interruption, interruptible

_LOGGER = logging.getLogger(__name__)

# After so long without a sign of life a process counts as dead, and JAX ends the others.
HEARTBEAT_TIMEOUT_S = 60
# Batch systems may start the processes of a job some minutes apart.
START_TIMEOUT_S = 300


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, before it computes anything.

    Args:
      coordinator_address: ``HOST:PORT`` at which process 0 is to be found.
      num_processes: how many there are.
      process_id: which one this is, from 0. What is ``None`` of these three JAX takes from the cluster
        (Slurm, Open MPI, Kubernetes, Cloud TPU).

    Raises:
      InputError: if a value is not allowed, or is ``None`` and cannot be found out.
    """
    if coordinator_address is not None:
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"--coordinator-address: got {coordinator_address!r}, allowed is HOST:PORT")
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num-processes: got {num_processes}, allowed are whole numbers from 1")
    if process_id is not None and (process_id < 0 or (num_processes is not None and process_id >= num_processes)):
        below = "the number of processes" if num_processes is None else num_processes
        raise InputError(f"--process-id: got {process_id}, allowed are whole numbers from 0 to below {below}")
    # What JAX says if the others do not come (it ends the process) does not tell whom it was waiting for.
    _LOGGER.info(
        "%s waits for the others, at most %d s; if one of them ends early, this one does so within %d s",
        *("this process" if process_id is None else f"process {process_id}", START_TIMEOUT_S, HEARTBEAT_TIMEOUT_S),
    )
    # JAX would take SIGTERM for itself, and go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=START_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except ValueError as error:
        missing = [
            flag
            for flag, value in (
                ("--coordinator-address", coordinator_address),
                ("--num-processes", num_processes),
                ("--process-id", process_id),
            )
            if value is None
        ]
        raise InputError(
            f"{', '.join(missing)}: not given, and JAX finds no cluster to take it from: {error}"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--coordinator-address: got {coordinator_address!r}, which cannot be used: {error}") from None


def is_first() -> bool:
    """Whether this is process 0, which alone reads and writes a run's files and reports.

    Examples:
      >>> is_first()
      True
    """
    return jax.process_index() == 0


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises an ``InputError``, in every process, that names the first setting not alike in all of them.

    Examples:
      >>> check_alike({"config.seed": 0})
    """
    counts = [sum(device.process_index == p for device in jax.devices()) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise InputError(f"devices: got {counts} in processes 0 to {len(counts) - 1}, allowed are equal numbers")
    everyones = [json.loads(text) for text in _gather(json.dumps({key: repr(v) for key, v in settings.items()}))]
    for key in dict.fromkeys(key for one in everyones for key in one):
        values = [one.get(key, "nothing") for one in everyones]
        for process, value in enumerate(values):
            if value != values[0]:
                raise InputError(
                    f"{key}: got {values[0]} in process 0 and {value} in process {process}, "
                    "allowed is the same value in every process"
                )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block in all processes: if it raises in some, it raises in every one of them.

    Without it the others would wait for a process that has given up. In those whose own block went
    well, the error names the process; it is an ``InputError`` if the input is wrong, or a
    :class:`~granq_jax.runtime.stopping.RunError`.

    Examples:
      >>> with together():
      ...     pass
    """
    try:
        yield
    except Exception as error:
        kind = "input" if isinstance(error, InputError) else "run"
        _gather(f"{kind} {str(error) or type(error).__name__}")
        raise
    for process, text in enumerate(_gather("")):
        kind, _, message = text.partition(" ")
        if kind:
            raise (InputError if kind == "input" else RunError)(f"process {process}: {message}")


def from_first(make: Callable[[], Any]) -> Any:
    """Calls ``make`` in process 0 and returns in every process what it gives.

    Args:
      make: called without arguments; gives nested dictionaries of arrays, numbers, strings or ``None``.

    Raises:
      Exception: what ``make`` raises, as :func:`together` does.

    Examples:
      >>> from_first(lambda: {"step": 3})
      {'step': 3}
    """
    value = None
    with together():
        if is_first():
            value = make()
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(flax.serialization.msgpack_serialize({"": value}), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    sent = data if is_first() else np.zeros(size, np.uint8)
    return flax.serialization.msgpack_restore(multihost_utils.broadcast_one_to_all(sent).tobytes())[""]


class _Shared(Interruption):
    """Of several processes: a signal to any of them is raised where all ask, in all at once."""

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        yield

    def agree(self) -> None:
        signals = [int(text) for text in _gather(str(self._signal or 0))]
        if any(signals):
            raise Interrupted(max(signals))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum


@contextlib.contextmanager
def interruptible_together(alone: Interruption) -> Iterator[Interruption]:
    """Within, signals are raised at the same step in all processes, where ``agree`` is called.

    Args:
      alone: what is given, unchanged, where there is one process.
    """
    if jax.process_count() == 1:
        yield alone
        return
    with interruptible(_Shared()) as shared:
        yield shared


def leave(status: int) -> NoReturn:
    """Ends this process at once: on the usual way out it would wait for others, who may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _gather(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.uint32(len(data)))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
