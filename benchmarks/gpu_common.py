"""What the parts of the GPU campaign share: tables that grow by the row, and the device's own clock."""

from __future__ import annotations

import csv
import dataclasses
import os
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

BEYOND_THE_CACHE = 256e6  # bytes; an H100 caches 50 MB
MOST_ARRAYS = 128


class Table:
    """A CSV file of which every row is on disk when :meth:`add` returns."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, [*columns, "error"]
        self._write("w", dict(zip(self.columns, self.columns, strict=True)))

    def add(self, **values: Any) -> None:
        """Adds a row; numbers are written with five digits."""
        self._write("a", {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in values.items()})

    def _write(self, mode: str, row: dict[str, Any]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())


@dataclasses.dataclass
class Context:
    """Where a part writes, and how long it may take.

    Attributes:
      out: directory of its tables.
      deadline: on the clock of ``time.monotonic``.
      rehearsal: whether sizes are to be tiny, and kernels interpreted, on any platform.
      options: the command line.
    """

    out: Path
    deadline: float
    rehearsal: bool
    options: Any

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def table(self, name: str, *columns: str) -> Table:
        """A new table of that name."""
        return Table(self.out / f"{name}.csv", columns)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text[:500]


class Event(NamedTuple):
    """An operation of the device.

    Attributes:
      module: the compiled program it belongs to, as XLA names it; ``""`` where the trace does not say.
      name: of the kernel or copy.
      start: seconds.
      seconds: how long it took.
    """

    module: str
    name: str
    start: float
    seconds: float


def events_of(profile: Any) -> list[Event]:
    """What the devices did, in the order of time.

    Args:
      profile: a ``jax.profiler.ProfileData``. On a GPU kernels and copies lie in the lines of its streams; on a
        CPU XLA's operations, among others, in those of the threads.
    """
    found = []
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or profile.planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # the same events again, put together by module or operation
            for event in line.events:
                stats = dict(event.stats)
                if gpus or "hlo_op" in stats:
                    module = str(stats.get("hlo_module", ""))
                    found.append(Event(module, event.name, event.start_ns / 1e9, event.duration_ns / 1e9))
    return sorted(found, key=lambda event: event.start)


def traced(run: Callable[[], Any]) -> list[Event]:
    """The device's events while ``run`` ran, which must have waited for what it started."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            run()
        files = list(Path(directory).rglob("*.xplane.pb"))
        return [event for file in files for event in events_of(jax.profiler.ProfileData.from_file(str(file)))]


def busy_seconds(events: Iterable[Event]) -> float:
    """How long at least one of the events was under way."""
    busy = end = 0.0
    for event in sorted(events, key=lambda event: event.start):
        busy += max(0.0, event.start + event.seconds - max(event.start, end))
        end = max(end, event.start + event.seconds)
    return busy


class Program(NamedTuple):
    """A compiled program to be timed, which takes each of ``arguments`` in turn."""

    name: str
    compiled: Any
    arguments: list[tuple]


class Timing(NamedTuple):
    """Of one run of a program.

    Attributes:
      seconds: median of the device's time, of all of its launches together.
      launches: of the device.
      clock: ``"device"``, or ``"host"`` where the trace holds nothing, and many runs in a row were timed instead.
    """

    seconds: float
    launches: float
    clock: str


def named(name: str, function: Callable) -> Any:
    """``jax.jit(function)``, which traces show as ``jit_name``."""

    def call(*args):
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call)


def timed(programs: Sequence[Program], runs: int) -> dict[str, Timing]:
    """Times programs one after the other in one trace, each on inputs that the cache does not hold."""
    for program in programs:
        for arguments in program.arguments[:2]:
            jax.block_until_ready(program.compiled(*arguments))
    hosts = {}

    def run():
        for program in programs:
            start = time.perf_counter()
            kept = [program.compiled(*program.arguments[i % len(program.arguments)]) for i in range(runs)]
            jax.block_until_ready(kept)
            hosts[program.name] = (time.perf_counter() - start) / runs

    by_module = defaultdict(list)
    for event in traced(run):
        by_module[event.module].append(event)
    timings = {}
    for program in programs:
        events = by_module.get(f"jit_{program.name}", [])
        if not events:
            timings[program.name] = Timing(hosts[program.name], float("nan"), "host")
            continue
        each, rest = divmod(len(events), runs)
        if rest or not each:
            seconds = sum(event.seconds for event in events) / runs
        else:
            sums = [sum(event.seconds for event in events[i : i + each]) for i in range(0, len(events), each)]
            seconds = statistics.median(sums)
        timings[program.name] = Timing(seconds, len(events) / runs, "device")
    return timings


_RANDOM = 1 << 26


def random_arrays(shape: Sequence[int], dtype: Any, count: int, seed: int = 0) -> list[np.ndarray]:
    """``count`` arrays of normal numbers, which are parts of one another where there are not enough."""
    size = int(np.prod(shape))
    pool = _pool(np.dtype(dtype), min(_RANDOM, max(2**20, 2 * size)))
    rng = np.random.default_rng(seed)
    if size > len(pool):
        return [np.resize(pool, size).reshape(shape) for _ in range(count)]
    starts = rng.integers(0, len(pool) - size + 1, count)
    return [pool[start : start + size].reshape(shape) for start in starts]


_POOLS: dict[Any, np.ndarray] = {}


def _pool(dtype, size):
    known = _POOLS.get(dtype)
    if known is None or len(known) < size:
        known = _POOLS[dtype] = np.random.default_rng(0).standard_normal(size, np.float32).astype(dtype)
    return known


def rotation(arguments: Sequence[jax.ShapeDtypeStruct], moved: float, rehearsal: bool) -> list[tuple]:
    """Arguments of that kind on the device, so many that together they move more than the cache holds."""
    count = 2 if rehearsal else min(MOST_ARRAYS, max(3, int(BEYOND_THE_CACHE / moved)))
    columns = [random_arrays(a.shape, a.dtype, count, seed) for seed, a in enumerate(arguments)]
    return [tuple(jax.device_put(value) for value in values) for values in zip(*columns, strict=True)]


class Compiler:
    """Compiles programs in threads, since XLA does so outside of Python's lock."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2))

    def __call__(self, function: Any, *arguments: Any) -> Future:
        """Traces ``function``, which is jitted, and gives what is being compiled; errors come from its ``result``.

        Settings of JAX's that hold now, in a ``with`` say, hold for the trace.
        """
        try:
            return self._pool.submit(function.lower(*arguments).compile)
        except Exception as error:
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """Drops what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
