"""``--mode profile``: a trace of a few warm joint steps, and the operations that cost most in it."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from granq_jax.config import make_trainer
from granq_jax.distill.joint_run import JointRun
from granq_jax.errors import reading_input
from granq_jax.files.writing import write_json
from granq_jax.modes.opening import opened
from granq_jax.runs import names
from granq_jax.runs.record import check_writable, describe, versions
from granq_jax.runs.workdir import locked
from granq_jax.runtime.processes import is_first
from granq_jax.teachers.load import check_teacher, load_teacher

WARM_STEPS = 3
TRACED_STEPS = 5
SHOWN = 10


class Op(NamedTuple):
    """An operation of the compiled step.

    Attributes:
      name: XLA's.
      calls: in all of the trace.
      seconds: in all of the trace, summed over threads; what it calls itself is not counted.
      source: where in the model and the losses it comes from; ``""`` where XLA does not say.
    """

    name: str
    calls: int
    seconds: float
    source: str = ""


def profile(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Traces joint steps after the warm-up phase, when everything is compiled: ``--mode profile``.

    In ``workdir`` it leaves ``profile/``, a trace for XProf and Perfetto, and ``profile.json``. The
    costliest operations are printed to stderr.

    Args:
      config: ``config.profile.steps`` steps are traced, or ``TRACED_STEPS`` where it is 0.
      workdir: made if it is missing.

    Returns:
      What ``profile.json`` holds.

    Raises:
      InputError: for a setting or teacher that cannot be used, or a
        ``workdir`` that cannot be written to, or that another process uses.
    """

    def check(workdir: Path) -> None:
        check_teacher(config)
        check_writable(workdir)

    workdir, devices, _ = opened("profile", config, workdir, check)
    with locked(workdir):
        return _profiled(config, workdir, devices)


def _profiled(config: ConfigDict, workdir: Path, devices: Sequence[jax.Device]) -> dict[str, Any]:
    with reading_input():
        teacher = load_teacher(config, workdir)
    run = JointRun(make_trainer(config), teacher, devices)
    for _ in range(WARM_STEPS):
        _timed_step(run)
    steps = config.profile.steps or TRACED_STEPS
    seconds_per_step = statistics.median(_timed_step(run) for _ in range(steps))
    directory = workdir / names.TRACES
    jax.profiler.start_trace(directory, create_perfetto_trace=True)
    traced_seconds = [_timed_step(run, number) for number in range(steps)]
    jax.profiler.stop_trace()

    trace = max(directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    ops = list(costliest(read_events(trace), _sources(run.compiled(warmup=False).as_text())))
    result = {
        **describe(config),
        "batch_size": config.batch_size,
        "trace": str(trace),
        "traced_steps": steps,
        "seconds_per_step": seconds_per_step,
        "seconds_per_step_traced": statistics.median(traced_seconds),
        "op_seconds_per_step": sum(op.seconds for op in ops) / steps,
        "ops": [
            {
                "name": op.name,
                "calls_per_step": op.calls / steps,
                "seconds_per_step": op.seconds / steps,
                "source": op.source,
            }
            for op in ops[:SHOWN]
        ],
        "devices": [str(device) for device in devices],
        "versions": versions(),
    }
    write_json(workdir / names.PROFILE, result)
    if is_first():
        print(ops_table(result), file=sys.stderr)
    return result


def ops_table(result: dict[str, Any]) -> str:
    """The costliest operations of a profile, as text, with what their times mean."""
    lines = [
        f"{result['seconds_per_step'] * 1e3:.1f} ms a step ({result['seconds_per_step_traced'] * 1e3:.1f} while "
        f"traced), operations {result['op_seconds_per_step'] * 1e3:.1f} ms a step, summed over threads and devices:",
        "operations run side by side on several, so that their sum is not the time of a step.",
        "",
        f"{'ms a step':>10} {'share':>7} {'calls':>6}  operation, and where it comes from",
    ]
    for op in result["ops"]:
        share = op["seconds_per_step"] / result["op_seconds_per_step"]
        lines.append(
            f"{op['seconds_per_step'] * 1e3:10.2f} {100 * share:5.1f} % {op['calls_per_step']:6.3g}  "
            f"{op['name']}  {op['source']}".rstrip()
        )
    return "\n".join(lines)


def read_events(trace: Path) -> list[dict[str, Any]]:
    """The events of a ``perfetto_trace.json.gz``, in the Trace Event Format."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def costliest(events: Iterable[dict[str, Any]], sources: dict[str, str] | None = None) -> Iterator[Op]:
    """Operations by the time they took themselves, the costliest first.

    Args:
      events: of a trace. Those of XLA operations name one in ``args.hlo_op``; others are left out.
      sources: where an operation of that name comes from.

    Examples:
      >>> loop = {"ph": "X", "pid": 1, "tid": 1, "ts": 0.0, "dur": 9.0, "args": {"hlo_op": "while.1"}}
      >>> dot = {"ph": "X", "pid": 1, "tid": 1, "ts": 1.0, "dur": 6.0, "args": {"hlo_op": "dot.2"}}
      >>> [(op.name, round(1e6 * op.seconds)) for op in costliest([loop, dot])]
      [('dot.2', 6), ('while.1', 3)]
    """
    by_thread = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            by_thread[event["pid"], event["tid"]].append(event)
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for of_thread in by_thread.values():
        around: list[tuple[float, str]] = []  # operations under way: when each ends, and its name
        for event in sorted(of_thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            name = event["args"]["hlo_op"]
            calls[name] += 1
            microseconds[name] += event["dur"]
            if around:
                microseconds[around[-1][1]] -= event["dur"]
            around.append((event["ts"] + event["dur"], name))
    for name in sorted(microseconds, key=lambda name: -microseconds[name]):
        yield Op(name, calls[name], microseconds[name] / 1e6, (sources or {}).get(name, ""))


def _timed_step(run: JointRun, number: int = 0) -> float:
    start = time.perf_counter()
    with jax.profiler.StepTraceAnnotation("joint_step", step_num=number):
        run.advance(warmup=False)
        jax.block_until_ready(run.state)
    return time.perf_counter() - start


def _sources(program: str | None) -> dict[str, str]:
    """By the name of an operation of a compiled program, the functions that it comes from."""
    pairs = re.findall(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*?op_name="([^"]*)"', program or "", re.MULTILINE)
    return {name: re.sub(r"^(jit|pmap)\([^)]*\)/", "", source) for name, source in pairs}
