"""Joint steps in a row: the state on its devices, each phase compiled once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import flax.core
import jax

from granq_jax.devices import place, sample_index, settle
from granq_jax.progress import Progress
from granq_jax.step import mapped_step
from granq_jax.trainer import Trainer, TrainState, Variables


class JointRun:
    """Joint steps over devices: state placed once, each phase compiled once.

    Attributes:
      state: the :class:`~granq_jax.trainer.TrainState` after the last step.
      compile_seconds: spent compiling so far.
    """

    def __init__(self, trainer: Trainer, teacher: Variables, devices: Sequence[jax.Device]):
        self._trainer = trainer
        self._devices = devices
        self._index = place(sample_index(trainer.batch_size, devices), devices, split=True)
        self._teacher = place(flax.core.unfreeze(dict(teacher)), devices)
        self._phases: dict[bool, jax.stages.Compiled] = {}
        self.state: TrainState = place(trainer.init(teacher), devices)
        self.compile_seconds = 0.0

    def compiled(self, warmup: bool) -> jax.stages.Compiled:
        """The step of a phase, which is compiled when it is first asked for."""
        if warmup not in self._phases:
            start = time.perf_counter()
            mapped = mapped_step(self._trainer, warmup, self._devices)
            self._phases[warmup] = mapped.lower(self.state, self._teacher, self._index).compile()
            self.compile_seconds += time.perf_counter() - start
        return self._phases[warmup]

    def advance(self, warmup: bool) -> dict[str, jax.Array]:
        """Takes a step and returns its metrics, which stay on the device until they are read."""
        self.state, metrics = self.compiled(warmup)(self.state, self._teacher, self._index)
        settle(metrics, self._devices)
        return metrics


def zero_shot_quantize(
    trainer: Trainer, teacher: Variables, *, epochs: int, devices: Sequence[jax.Device] | None = None
) -> Variables:
    """Quantizes any Flax classifier without data and returns the student's variables.

    They have the structure of the teacher's and are used with
    ``quantize(trainer.model, trainer.spec).apply``.

    Args:
      trainer: model, generator, and how to quantize and train.
      teacher: the trained variables of ``trainer.model``.
      epochs: of ``trainer.optimizers.steps_per_epoch`` steps, warm-up included.
      devices: to spread the batch over; by default all local ones.

    Raises:
      ValueError: if the batch does not divide evenly over the devices, or no epoch is left after
        the warm-up.
    """
    o = trainer.optimizers
    if type(epochs) is not int or epochs <= o.warmup_epochs:
        raise ValueError(f"epochs: got {epochs!r}, allowed are whole numbers above the warm-up's {o.warmup_epochs}")
    run = JointRun(trainer, teacher, devices or jax.local_devices())
    total = epochs * o.steps_per_epoch
    with Progress(total) as progress:
        for step in range(total):
            run.advance(warmup=step < o.warmup_epochs * o.steps_per_epoch)
            progress.update(step + 1)
    return jax.device_get(run.state.student)
