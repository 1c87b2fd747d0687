"""TensorBoard's event files, written by tensorboardX: which imports PyTorch where that is installed, for seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class Events:
    """A file for each start; TensorBoard forgets what earlier ones hold of the steps after ``step``."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        # Written by this thread: tensorboardX's own would die of a full disk, and its queue then hold up the run.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".after{step}")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step, summary=summary.scalar(name, value))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Adds an image, (H, W, C) uint8."""
        self._write(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def histogram(self, name: str, counts: np.ndarray, step: int) -> None:
        """Adds a histogram over 0, 1, ..., each of which was found ``counts`` times."""
        levels = np.arange(len(counts))
        histogram = summary.histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=int(counts.sum()),
            sum=float(counts @ levels),
            sum_squares=float(counts @ levels**2),
            bucket_limits=(levels + 0.5).tolist(),
            bucket_counts=counts.tolist(),
        )
        self._write(step, summary=histogram)

    def flush(self) -> None:
        """Hands to the system what is not yet written."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **what))
