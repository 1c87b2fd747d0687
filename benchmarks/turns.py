"""Programs that take turns: each in a process of its own, one at a time, so that none slows another."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

OURS = "granq_jax"
FORMATS = ("channels_first", "channels_last")  # the baseline is measured in both


def beside_pytorch(ours: Callable, baseline: Callable, args: tuple) -> dict[str, tuple[Callable, tuple]]:
    """The sides for :func:`measure_in_turns`: ``ours(*args)`` and ``baseline(*args, memory_format)``."""
    return {OURS: (ours, args)} | {name: (baseline, (*args, name)) for name in FORMATS}


def measure_in_turns(sides: dict[str, tuple[Callable, tuple]], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs every side once to warm up, and then all of them in turn, ``rounds`` times.

    Args:
      sides: by name a function and its arguments, all of them picklable. It is called in a process
        of its own, prepares what it needs, and returns a function without arguments that measures
        once and returns figures by name.
      rounds: how often each side measures.

    Returns:
      For every side ``{"rounds": [figures, ...], "peak_rss_gb": most memory it held}``.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for name, (prepare, args) in sides.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        processes[name].start()
        theirs.close()
        pipes[name].recv()  # ready: prepared and warm, before the next side starts
    results: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in sides}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send("measure")
            results[name]["rounds"].append(pipe.recv())
    for name, pipe in pipes.items():
        pipe.send("end")
        results[name]["peak_rss_gb"] = pipe.recv()
        processes[name].join()
    return results


def _serve(pipe, prepare, args):
    measure = prepare(*args)
    measure()
    pipe.send("ready")
    while pipe.recv() == "measure":
        pipe.send(measure())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)  # Linux counts in KiB
