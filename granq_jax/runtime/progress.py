"""How far a loop is: one live line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm

from granq_jax.runtime.processes import is_first

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows on stderr how far a loop is, how fast it goes and how long it still takes.

    On a terminal, and in a notebook, that is one bar which moves. Elsewhere (a log file, a batch
    system) it is a line of its own when there is something to say for the first time, then at most
    every ``SECONDS_BETWEEN_LINES``, and at the end; never a carriage return. Of several processes, the
    first shows it.

    Args:
      total: units of work there are.
      unit: what they are called.
      label: what is said before them.
      done: units that an earlier process did.

    Example::

      with Progress(1000, label="teacher") as progress:
          for step in range(1, 1001):
              ...
              progress.update(step, loss="0.1234")
    """

    def __init__(self, total: int, *, unit: str = "step", label: str = "", done: int = 0):
        self._silent = not is_first()
        live = not self._silent and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc=f"{label}: " if label else "",
            disable=not live,
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left{postfix}",
        )
        self._total, self._unit, self._label = total, unit, label
        self._done, self._shown = done, ""
        self._first: tuple[int, float] | None = None  # units done and the time, at the first update
        self._printed: tuple[int, float] | None = None  # the same at the last line

    def update(self, done: int, **shown: str) -> None:
        """Says that ``done`` units are done, with names and values to show beside it."""
        self._shown = ", ".join(f"{name} {value}" for name, value in shown.items())
        self._bar.set_postfix_str(self._shown, refresh=False)
        if self._first is None:  # what came before was preparation and compiling, which tells nothing of the rate
            self._first = done, time.monotonic()
            self._bar.n = self._bar.initial = self._bar.last_print_n = done
            if not self._bar.disable:
                self._bar.unpause()
                self._bar.refresh()
        else:
            self._bar.update(done - self._done)
        self._done = done
        due = self._printed is None or time.monotonic() - self._printed[1] >= SECONDS_BETWEEN_LINES
        if self._bar.disable and (due or done == self._total):
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line of its own to stderr, without tearing the bar; stdout is left to results."""
        if self._silent:
            return
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar, or the last line, as it is."""
        if self._bar.disable and self._printed is not None and self._done > self._printed[0]:
            self._print_line()
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        parts = [f"{self._unit} {self._done}/{self._total} ({100 * self._done / self._total:.0f} %)"]
        if self._first is not None and self._printed is not None:
            # The rate is that since the last line, the time left goes by the mean, which has seen more.
            rate = (self._done - self._printed[0]) / max(now - self._printed[1], 1e-9)
            left = (now - self._first[1]) / max(self._done - self._first[0], 1) * (self._total - self._done)
            parts += [f"{rate:.3g} {self._unit}s/s", f"{tqdm.format_interval(left)} left"]
        line = ", ".join([*parts, self._shown] if self._shown else parts)
        self.say(f"{self._label}: {line}" if self._label else line)
        self._printed = self._done, now
