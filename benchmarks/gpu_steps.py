"""Part d: the joint step of the networks: with the kernels, in XLA's form, and the same arithmetic in PyTorch.

Every side has a process of its own; they take turns, in rounds of many steps between which nothing waits. The device's
own time, its launches and what they are come from a trace of a few steps.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import defaultdict
from typing import NamedTuple

from gpu_common import Context, Event, busy_seconds, reason, traced
from joint_step import joint_run
from turns import FORMATS, Side, SideError

KERNELS, XLA, EAGER, COMPILED = "kernels", "XLA", "PyTorch", "PyTorch compiled"
STEPS_AT_ONCE = 20
LOOPED, GRAPHS = f"{KERNELS}, {STEPS_AT_ONCE} steps a program", f"{COMPILED}, CUDA graphs"
OURS = (KERNELS, LOOPED, XLA)
PYTORCH = tuple(f"{EAGER} {name}" for name in FORMATS)
COLUMNS = (
    *("network", "batch", "precision", "side", "ms", "least_ms", "most_ms", "over_kernels", "device_ms", "launches"),
    *("peak_gb", "temporary_gb", "moved_gb", "gflop", "prepare_s"),
)
ROUNDS, ROUND_SECONDS, TRACED = 5, 0.6, 5
SHOWN = 25
PATIENCE = 270.0  # seconds that the sides of a job may take to prepare
# By the first that is found in the name of a launch.
KINDS = (
    ("quantizer", r"fake_quant_|quantize_"),
    ("copy", r"memcpy|memset|copy_kernel|MemcpyD2D"),
    ("convolution", r"conv|cudnn|implicit|wgrad|dgrad|fprop|winograd|xmma|depthwise|nchwToNhwc|nhwcToNchw|cutlass__5x"),
    ("matrix product", r"gemm|dot|cublas|cutlass|nvjet|splitK"),
    ("reduction", r"reduce|norm|softmax|welford|aminmax|mean|sum"),
    (
        "element-wise",
        r"fusion|elementwise|triton_|wrapped|loop|vectorized|multi_tensor|transpose|concat|select|scatter",
    ),
)


class Job(NamedTuple):
    """Sides that are measured in turns."""

    network: str
    batch: int
    precision: str
    sides: tuple[str, ...]


TORCH = (*PYTORCH, COMPILED)
JOBS = (
    Job("resnet20_cifar10", 16, "tf32", (KERNELS, XLA, *TORCH)),
    Job("resnet18", 16, "tf32", (KERNELS, XLA, *TORCH)),
    Job("resnet20_cifar10", 16, "tf32", (KERNELS, LOOPED, GRAPHS)),
    Job("resnet20_cifar100", 200, "tf32", (KERNELS, *TORCH)),
    Job("mobilenetv2_w1", 16, "tf32", (KERNELS, *TORCH)),
    Job("resnet50", 16, "tf32", (KERNELS, *TORCH)),
    Job("resnet20_cifar10", 64, "tf32", (KERNELS, *TORCH)),
    Job("resnet20_cifar100", 200, "tf32", (KERNELS, XLA)),
    Job("mobilenetv2_w1", 16, "tf32", (KERNELS, XLA)),
    Job("resnet50", 16, "tf32", (KERNELS, XLA)),
    Job("resnet18", 16, "tf32", (KERNELS, LOOPED, GRAPHS)),
    Job("resnet18", 16, "float32", (KERNELS, *PYTORCH)),
    Job("resnet20_cifar10", 16, "float32", (KERNELS, *PYTORCH)),
)


def run(context: Context) -> None:
    """Writes ``steps.csv`` and ``operations.csv``."""
    steps = context.table("steps", *COLUMNS)
    operations = context.table(
        "operations", *("network", "batch", "precision", "side", "kind", "operation", "calls", "us")
    )
    rehearsed = Job("resnet20_cifar10", 2, "tf32", (KERNELS, LOOPED, PYTORCH[0], COMPILED, GRAPHS))
    jobs = [rehearsed] if context.rehearsal else JOBS
    if chosen := context.options.networks:
        jobs = [job for job in jobs if {job.network, f"{job.network}@{job.batch}"} & set(chosen)]
    for job in jobs:
        if context.left < 60:
            print(f"left out: {job.network}, batch {job.batch}, {job.precision}: {', '.join(job.sides)}", flush=True)
            continue
        _measure(job, context, steps, operations)


def _measure(job, context, steps, operations):
    begun = time.monotonic()
    sides: dict[str, Side] = {}
    prepared: dict[str, float] = {}
    described = {"network": job.network, "batch": job.batch, "precision": job.precision}

    def failed(name, error):
        steps.add(**described, side=name, error=str(error))
        print(f"{job.network}@{job.batch} {name}: {str(error)[:200]}", flush=True)
        if name in sides:
            sides.pop(name).kill()

    def start(name):
        sides[name] = Side(prepare, (name, job, context.rehearsal))

    try:
        for name in job.sides:
            if name not in OURS[1:]:
                start(name)
        for name in sorted(job.sides, key=(*OURS, *TORCH, GRAPHS).index):
            if name in OURS[1:]:  # after the kernels' side, lest each disturbs what the other tries out
                start(name)
            try:
                patience = PATIENCE - (time.monotonic() - begun)
                patience = context.left - 25 if context.rehearsal else min(context.left - 25, patience)
                sides[name].wait(max(1.0, patience))
                prepared[name] = time.monotonic() - begun
            except SideError as error:
                failed(name, error)
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(1 if context.rehearsal else ROUNDS):
            for name in list(sides):
                try:
                    seconds[name].append(sides[name].ask("round", max(1.0, context.left)))
                except SideError as error:
                    failed(name, error)
        for name in list(sides):
            times = seconds[name]
            figures = {"ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
            row = {**described, "side": name, **{key: 1e3 * value for key, value in figures.items()}}
            if KERNELS in sides:
                row["over_kernels"] = figures["ms"] / statistics.median(seconds[KERNELS])
            row["prepare_s"] = prepared[name]
            try:
                details, launches = sides[name].ask("details", max(1.0, context.left + 10))
            except SideError as error:
                steps.add(**row, error=str(error))
                continue
            steps.add(**row, **details)
            for launch in launches:
                operations.add(**described, side=name, **launch)
        told = ", ".join(f"{name} {1e3 * statistics.median(seconds[name]):.2f} ms" for name in sides)
        print(f"{job.network}@{job.batch} {job.precision}: {told}; {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        for side in sides.values():
            side.kill()


def prepare(side: str, job: Job, rehearsal: bool):
    """Of a side, in its own process: a function that measures a ``"round"`` or its ``"details"``."""
    take, wait, details, at_once = (_ours if side in OURS else _pytorch)(side, job, rehearsal)

    def timed(takes):
        start = time.perf_counter()
        for _ in range(takes):
            take()
        wait()
        return (time.perf_counter() - start) / (takes * at_once)

    few = 1 if rehearsal else 5
    timed(few)
    takes = 1 if rehearsal else max(few, int(ROUND_SECONDS / timed(few) / at_once))
    return lambda what: details() if what == "details" else timed(takes)


def _ours(side, job, rehearsal):
    import jax

    from tools.gpu_check.hlo import moved_bytes

    impl = "xla" if side == XLA else "pallas_interpret" if rehearsal else "auto"
    run = joint_run(job.network, job.batch, impl, job.precision)
    at_once = 1 if side != LOOPED else 2 if rehearsal else STEPS_AT_ONCE
    program = run.compiled(warmup=False, steps=at_once)

    def take():
        run.advance(warmup=False, steps=at_once)

    def wait():
        jax.block_until_ready(run.state)

    def memory():
        # What the allocator has held at most counts what XLA tried out as it compiled: so what the program says.
        held = program.memory_analysis()
        arguments = held.argument_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes
        return {
            "temporary_gb": held.temp_size_in_bytes / 1e9,
            "peak_gb": (held.temp_size_in_bytes + arguments) / 1e9,
        }

    def work():
        cost = program.cost_analysis()
        return {"gflop": (cost[0] if isinstance(cost, list) else cost)["flops"] / 1e9}

    def moved():
        return {"moved_gb": moved_bytes(program.as_text()) / 1e9}

    def details():
        found: dict[str, float] = {}
        for figures in (memory,) if at_once > 1 else (memory, work, moved):  # a loop's are counted once or not at all
            try:
                found |= figures()
            except Exception as error:  # not every version of XLA tells
                print(f"{job.network} {side}: {reason(error)}", flush=True)

        def some():
            for _ in range(TRACED):
                take()
            wait()

        times, launches = _of_events(traced(some), TRACED * at_once)
        return found | times, launches

    return take, wait, details, at_once


def _pytorch(side, job, rehearsal):
    import torch
    from torch_baseline import JointStep

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precise = job.precision == "float32"
    torch.set_float32_matmul_precision("highest" if precise else "high")
    torch.backends.cudnn.allow_tf32 = not precise
    torch.backends.cudnn.benchmark = True
    compiled = {COMPILED: True, GRAPHS: "reduce-overhead"}.get(side, False)
    if compiled and hasattr(os, "sched_setaffinity") and not rehearsal:
        cores = sorted(os.sched_getaffinity(0))  # half of them, so that it leaves the others in peace as it compiles
        os.sched_setaffinity(0, cores[len(cores) // 2 :])
    memory_format = FORMATS[1] if compiled else side.removeprefix(f"{EAGER} ")
    take = JointStep(job.batch, job.network, memory_format, device=device, compiled=compiled)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def details():
        found = {}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            take()
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profile:
            for _ in range(TRACED):
                take()
            wait()
        events = [
            Event("", event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
            for event in profile.events()
            if device == "cpu" or (event.device_type == torch.autograd.DeviceType.CUDA and event.name != "Context Sync")
        ]
        times, launches = _of_events(events, TRACED)
        return found | times, launches

    return take, wait, details, 1


def kind_of(name: str) -> str:
    """What kind of operation a launch is, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "other")


def _of_events(events, steps):
    """Times a step, and the launches, by kind and the costliest by name."""
    by_name, by_kind = defaultdict(list), defaultdict(list)
    for event in events:
        by_name[event.name].append(event.seconds)
        by_kind[kind_of(event.name)].append(event.seconds)
    launches = [
        {"kind": kind, "operation": name[:160], "calls": len(times) / steps, "us": 1e6 * sum(times) / steps}
        for names in (((kind, "all", times) for kind, times in by_kind.items()), _costliest(by_name))
        for kind, name, times in names
    ]
    return {"device_ms": 1e3 * busy_seconds(events) / steps, "launches": len(events) / steps}, launches


def _costliest(by_name):
    names = sorted(by_name, key=lambda name: -sum(by_name[name]))
    return ((kind_of(name), name, by_name[name]) for name in names[:SHOWN])
