"""What a run writes while it goes on: ``metrics.jsonl`` and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

LOSSES = ("loss_g", "loss_s", "hinge", "onehot", "bns")
RATES = ("lr_g", "lr_s")


class MetricsLog:
    """Writes one JSON object a line, flushed as written, and shows how far the run is."""

    def __init__(self, path: Path, total_steps: int):
        self._file = path.open("x")
        self._start = time.monotonic()
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)

    def train(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Logs a training line and moves the bar to ``step``."""
        ordered = {name: values[name] for name in LOSSES + RATES}
        self._write({"step": step, "epoch": epoch, **ordered, "seconds": round(time.monotonic() - self._start, 3)})
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
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Closes file and bar."""
        self._bar.close()
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
