"""What a run writes while it goes on: ``metrics.jsonl`` and a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from granq_jax.processes import is_first

_LOGGER = logging.getLogger(__name__)
LOSSES = ("loss_g", "loss_s", "hinge", "onehot", "bns")
RATES = ("lr_g", "lr_s")


class MetricsLog:
    """Writes one JSON object a line, each at once, and shows how far the run is.

    Of several processes, the first does so; the logs of the others do nothing.
    """

    def __init__(self, path: Path, total_steps: int, *, step: int = 0, seconds: float = 0.0, size: int = 0):
        """Opens a new log, or goes on with the one at ``path``.

        Args:
          path: of the file.
          total_steps: of the run.
          step: those taken before.
          seconds: those that had passed.
          size: bytes of the file that count; later ones are cut off.
        """
        self._start = time.monotonic() - seconds
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not is_first())
        self._file = None
        if not is_first():
            return
        self._file = path.open("ab", buffering=0)  # a disk that is full is heard of at once
        there = path.read_bytes()
        if len(there) < size:
            _LOGGER.warning("%r has lost lines: it is shorter than it was at step %d", str(path), step)
        self._file.truncate(there[:size].rfind(b"\n") + 1)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a stop and going on."""
        return time.monotonic() - self._start

    def saved_size(self) -> int:
        """Bytes in the file, which are on the disk when this returns."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def train(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Logs a training line and moves the bar to ``step``."""
        ordered = {name: values[name] for name in LOSSES + RATES}
        self._write({"step": step, "epoch": epoch, **ordered, "seconds": round(self.seconds, 3)})
        shown = {name: f"{values[name]:.4g}" for name in LOSSES}
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def evaluation(self, step: int, epoch: int, student_top1: float) -> None:
        """Logs an evaluation line."""
        self._write({"step": step, "epoch": epoch, "student_top1": student_top1})
        self.say(f"after epoch {epoch}: student top-1 {student_top1:.2f} %")

    def say(self, line: str) -> None:
        """Prints a line to stderr without tearing the bar; stdout is left to results."""
        if self._file is not None:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Closes file and bar."""
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        # JSON has no word for what is not finite, which a step that was left out may hold.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        rest = memoryview((json.dumps(finite, allow_nan=False) + "\n").encode())
        while rest:
            rest = rest[self._file.write(rest) :]
