"""What a run writes while it goes on: ``metrics.jsonl``, TensorBoard event files, and how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from granq_jax.progress import Progress

LOSSES = ("loss_g", "loss_s", "hinge", "onehot", "bns")
RATES = ("lr_g", "lr_s")
EVENTS = "tensorboard"


class MetricsLog:
    """Writes one JSON object a line, flushed as written, the same for TensorBoard, and shows the progress.

    Args:
      workdir: of the run; ``metrics.jsonl`` and ``tensorboard/`` in it are written.
      total_steps: of the run.
      epochs: of the run.
      done: steps that an earlier start took; what it logged of later ones is taken back.
    """

    def __init__(self, workdir: Path, total_steps: int, epochs: int, done: int = 0):
        self._file = (workdir / "metrics.jsonl").open("x")
        self._start = time.monotonic()
        # A file for each start; TensorBoard forgets what earlier ones hold from `purge_step` on.
        self._events = SummaryWriter(
            str(workdir / EVENTS), purge_step=done + 1, flush_secs=10, filename_suffix=f".after{done}"
        )
        self._progress = Progress(total_steps, done=done)
        self._epochs = epochs
        self._top1: dict[str, str] = {}

    def train(self, step: int, epoch: int, values: Mapping[str, float], seconds_per_step: float) -> None:
        """Logs a training line."""
        ordered = {name: values[name] for name in LOSSES + RATES}
        self._write({"step": step, "epoch": epoch, **ordered, "seconds": round(time.monotonic() - self._start, 3)})
        for name, value in ordered.items():
            self._events.add_scalar(f"{'loss' if name in LOSSES else 'learning_rate'}/{name}", value, step)
        self._events.add_scalar("speed/steps_per_second", 1 / seconds_per_step, step)
        shown = {name: f"{values[name]:.4g}" for name in LOSSES}
        self._progress.update(step, epoch=f"{epoch}/{self._epochs}", **self._top1, **shown)

    def evaluation(self, step: int, epoch: int, student_top1: float) -> None:
        """Logs an evaluation line."""
        self._write({"step": step, "epoch": epoch, "student_top1": student_top1})
        self.accuracy(step, student_top1=student_top1)
        self.say(f"after epoch {epoch}: student top-1 {student_top1:.2f} %")

    def accuracy(self, step: int, **top1: float) -> None:
        """Tells TensorBoard of accuracies in percent; that of the student is shown from now on."""
        for name, value in top1.items():
            self._events.add_scalar(f"accuracy/{name}", value, step)
        if "student_top1" in top1:
            self._top1 = {"top-1": f"{top1['student_top1']:.2f} %"}

    def images(self, step: int, grid: np.ndarray) -> None:
        """Shows TensorBoard generated images, (H, W, C) uint8."""
        self._events.add_image("generated", grid, step, dataformats="HWC")

    def codes(self, step: int, name: str, counts: np.ndarray) -> None:
        """Shows TensorBoard how often each code was used: a histogram over the codes 0, 1, ..."""
        levels = np.arange(len(counts))
        self._events.add_histogram_raw(
            f"codes/{name}",
            min=0,
            max=len(counts) - 1,
            num=int(counts.sum()),
            sum=float(counts @ levels),
            sum_squares=float(counts @ levels**2),
            bucket_limits=(levels + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def say(self, line: str) -> None:
        """Prints a line to stderr; stdout is left to results."""
        self._progress.say(line)

    def close(self) -> None:
        """Closes the files and ends the progress shown."""
        self._progress.close()
        self._events.close()
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
