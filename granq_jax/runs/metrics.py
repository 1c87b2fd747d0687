"""What a run writes while it goes on: ``metrics.jsonl``, TensorBoard event files, and how far it is."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granq_jax.runs import names
from granq_jax.runtime.processes import is_first
from granq_jax.runtime.progress import Progress

_LOGGER = logging.getLogger(__name__)
LOSSES = ("loss_g", "loss_s", "hinge", "onehot", "bns")
RATES = ("lr_g", "lr_s")


class MetricsLog:
    """Writes one JSON object a line, each at once, the same for TensorBoard, and shows the progress.

    Of several processes, the first does so; the logs of the others do nothing.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        epochs: int,
        *,
        step: int = 0,
        seconds: float = 0.0,
        size: int = 0,
    ):
        """Opens new logs, or goes on with those in ``workdir``.

        Args:
          workdir: of the run; ``metrics.jsonl`` and ``tensorboard/`` in it are written.
          total_steps: of the run.
          epochs: of the run.
          step: those taken before; what was logged of later ones is taken back.
          seconds: those that had passed.
          size: bytes of ``metrics.jsonl`` that count; later ones are cut off.
        """
        self._start = time.monotonic() - seconds
        self._progress = Progress(total_steps, done=step)
        self._epochs = epochs
        self._top1: dict[str, str] = {}
        self._file = self._events = None
        if not is_first():
            return
        path = workdir / names.METRICS
        self._file = path.open("ab", buffering=0)  # a disk that is full is heard of at once
        there = path.read_bytes()
        if len(there) < size:
            _LOGGER.warning("%r has lost lines: it is shorter than it was at step %d", str(path), step)
        self._file.truncate(there[:size].rfind(b"\n") + 1)
        from granq_jax.runs.events import Events  # here: what it imports takes seconds where PyTorch is installed

        self._events = Events(workdir / names.EVENTS, step)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a stop and going on."""
        return time.monotonic() - self._start

    def saved_size(self) -> int:
        """Bytes in ``metrics.jsonl``, which are on the disk when this returns."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def train(self, step: int, epoch: int, values: Mapping[str, float], seconds_per_step: float) -> None:
        """Logs a training line."""
        ordered = {name: values[name] for name in LOSSES + RATES}
        self._write({"step": step, "epoch": epoch, **ordered, "seconds": round(self.seconds, 3)})
        for name, value in ordered.items():
            self._scalar(f"{'loss' if name in LOSSES else 'learning_rate'}/{name}", value, step)
        self._scalar("speed/steps_per_second", 1 / seconds_per_step, step)
        if self._events is not None:
            self._events.flush()
        shown = {name: f"{values[name]:.4g}" for name in LOSSES}
        self._progress.update(step, epoch=f"{epoch}/{self._epochs}", **self._top1, **shown)

    def evaluation(self, step: int, epoch: int, student_top1: float) -> None:
        """Logs an evaluation line."""
        self._write({"step": step, "epoch": epoch, "student_top1": student_top1})
        self.accuracy(step, student_top1=student_top1)
        self.say(f"after epoch {epoch}: student top-1 {student_top1:.2f} %")

    def guard(self, step: int, epoch: int, error: float, agreement: float) -> None:
        """Logs what the guard sees: the relative error, and the agreement in percent, on held-out images."""
        self._write({"step": step, "epoch": epoch, "guard_error": error, "guard_agreement": agreement})
        self._scalar("guard/error", error, step)
        self._scalar("guard/agreement", agreement, step)

    def accuracy(self, step: int, **top1: float) -> None:
        """Tells TensorBoard of accuracies in percent; that of the student is shown from now on."""
        for name, value in top1.items():
            self._scalar(f"accuracy/{name}", value, step)
        if "student_top1" in top1:
            self._top1 = {"top-1": f"{top1['student_top1']:.2f} %"}

    def images(self, step: int, grid: np.ndarray) -> None:
        """Shows TensorBoard generated images, (H, W, C) uint8."""
        if self._events is not None:
            self._events.image("generated", grid, step)

    def codes(self, step: int, name: str, counts: np.ndarray) -> None:
        """Shows TensorBoard how often each code was used: a histogram over the codes 0, 1, ..."""
        if self._events is not None:
            self._events.histogram(f"codes/{name}", counts, step)

    def say(self, line: str) -> None:
        """Prints a line to stderr; stdout is left to results."""
        self._progress.say(line)

    def close(self) -> None:
        """Closes the files and ends the progress shown."""
        self._progress.close()
        for log in (self._events, self._file):
            if log is not None:
                log.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._events is not None and math.isfinite(value):
            self._events.scalar(name, value, step)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        # JSON has no word for what is not finite, which a step that was left out may hold.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        rest = memoryview((json.dumps(finite, allow_nan=False) + "\n").encode())
        while rest:
            rest = rest[self._file.write(rest) :]
