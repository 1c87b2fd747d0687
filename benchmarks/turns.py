"""Programs that take turns: each in a process of its own, one at a time, so that none slows another."""

from __future__ import annotations

import multiprocessing
import resource
import traceback
from collections.abc import Callable
from typing import Any

OURS = "granq_jax"
FORMATS = ("channels_first", "channels_last")  # the baseline is measured in both
PEER = "PyTorch or pytorchcv is not installed: pip install -e '.[parity]'"


def beside_pytorch(ours: Callable, baseline: Callable, args: tuple) -> dict[str, tuple[Callable, tuple]]:
    """The sides for :func:`measure_in_turns`: ``ours(*args)`` and ``baseline(*args, memory_format)``."""
    return {OURS: (ours, args)} | {name: (baseline, (*args, name)) for name in FORMATS}


class SideError(RuntimeError):
    """Raised where a side failed, or took too long; says why in a line."""


class Side:
    """A program in a process of its own, which prepares as soon as this is made.

    Args:
      prepare: a function that can be pickled. It is called in that process, prepares what it needs, and returns a
        function that measures once and returns figures by name; its argument is that of :meth:`ask`.
      args: of ``prepare``.
    """

    def __init__(self, prepare: Callable, args: tuple = ()):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float | None = None) -> Any:
        """What it has to say next: that it is ready, or its answer.

        Raises:
          SideError: if it failed, or says nothing for so many seconds.
        """
        try:
            if not self._pipe.poll(seconds):
                raise SideError(f"nothing came for {seconds:.0f} s")
            status, value = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise SideError(f"its process ended with status {self._process.exitcode}") from None
        if status == "failed":
            raise SideError(value)
        return value

    def ask(self, what: Any = None, seconds: float | None = None) -> Any:
        """Has it measure; errors are those of :meth:`wait`."""
        try:
            self._pipe.send(("measure", what))
        except OSError:
            raise SideError("its process has ended") from None
        return self.wait(seconds)

    def end(self) -> float:
        """Ends the process and returns the most memory it held, in GB."""
        self._pipe.send(("end", None))
        held = self.wait()
        self._process.join()
        return held

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()


def measure_in_turns(sides: dict[str, tuple[Callable, tuple]], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs every side once to warm up, and then all of them in turn, ``rounds`` times.

    Args:
      sides: by name a function and its arguments, as :class:`Side` takes them.
      rounds: how often each side measures.

    Returns:
      For every side ``{"rounds": [figures, ...], "peak_rss_gb": most memory it held}``.

    Raises:
      SystemExit: if a side cannot run, with the reason: that PyTorch is to be installed, say.
    """
    processes: dict[str, Side] = {}
    try:
        for name, (prepare, args) in sides.items():
            processes[name] = Side(prepare, args)
            processes[name].wait()  # prepared, before the next side starts
            processes[name].ask()  # and warm
        results: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in sides}
        for _ in range(rounds):
            for name, side in processes.items():
                results[name]["rounds"].append(side.ask())
        for name, side in processes.items():
            results[name]["peak_rss_gb"] = side.end()
    except SideError as error:
        raise SystemExit(str(error)) from None
    finally:
        for side in processes.values():
            side.kill()
    return results


def _serve(pipe, prepare, args):
    try:
        measure = prepare(*args)
        pipe.send(("ready", None))
        while (message := pipe.recv())[0] == "measure":
            pipe.send(("measured", measure() if message[1] is None else measure(message[1])))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        pipe.send(("failed", PEER if missing in ("torch", "pytorchcv") else str(error)))
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", " ".join("".join(traceback.format_exception_only(error)).split())))
        return
    # Linux counts in KiB.
    pipe.send(("ended", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))
