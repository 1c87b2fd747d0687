"""Joint steps in a row: the state on its devices, each phase compiled once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.core
import flax.linen as nn
import jax
import numpy as np

from granq_jax.distill.joint_step import CHECKED, mapped_step
from granq_jax.distill.trainer import Trainer, TrainState, Variables, evaluation_mode
from granq_jax.errors import InputError
from granq_jax.quant import quantize
from granq_jax.runtime.compilation_cache import COMPILED_FAST
from granq_jax.runtime.devices import place, sample_index, settle
from granq_jax.runtime.memory import compile_to_repeat, without_collecting
from granq_jax.runtime.progress import Progress

_LOGGER = logging.getLogger(__name__)
_IMAGES_LOOKED_AT = 16
_WORDS = {name: f"the loss term {name} is" for name in CHECKED} | {
    name: f"a parameter of the {name} is" for name in ("generator", "student")
}


class NonFiniteError(RuntimeError):
    """Raised for a step with a loss or parameter that is not finite."""


class NonFinite(NamedTuple):
    """A step with something that is not finite: its number from 1, and what, in words."""

    step: int
    what: str


class JointRun:
    """Joint steps over devices: state placed once, each phase compiled once.

    Attributes:
      trainer: what the steps are made of.
      devices: where they are taken.
      state: the :class:`~granq_jax.distill.trainer.TrainState` after the last step.
      step: steps taken, those before ``state`` was handed over included.
      compile_seconds: spent compiling so far.
    """

    def __init__(
        self, trainer: Trainer, teacher: Variables, devices: Sequence[jax.Device], state: TrainState | None = None
    ):
        """Prepares steps from ``state`` on, which is by default that before the first one."""
        self.trainer = trainer
        self.devices = devices
        self._index = place(sample_index(trainer.batch_size, devices), devices, split=True)
        teacher = nn.meta.unbox(flax.core.unfreeze(dict(teacher)))
        self._teacher = place(teacher, devices)
        self._programs: dict[tuple[bool, int], jax.stages.Compiled] = {}
        self.state: TrainState = place(trainer.init(teacher) if state is None else state, devices)
        self.step = int(self.state.step)
        self.compile_seconds = 0.0
        self._unchecked: list[jax.Array] = []

    def compiled(self, warmup: bool, steps: int = 1) -> jax.stages.Compiled:
        """So many steps of a phase in one program, which is compiled when it is first asked for."""
        if (warmup, steps) not in self._programs:
            start = time.perf_counter()
            mapped = mapped_step(self.trainer, warmup, self.devices, steps)
            with without_collecting():
                lowered = mapped.lower(self.state, self._teacher, self._index)
            self._programs[warmup, steps] = compile_to_repeat(lowered, self.devices[0].platform)
            self.compile_seconds += time.perf_counter() - start
        return self._programs[warmup, steps]

    def advance(self, warmup: bool, steps: int = 1) -> dict[str, jax.Array]:
        """Takes one step, or several in one program, and returns the metrics of the last.

        They stay on the device until they are read. On CPUs several in one are far slower than one by one.
        """
        self.state, metrics = self.compiled(warmup, steps)(self.state, self._teacher, self._index)
        settle(metrics, self.devices)
        self.step += steps
        self._unchecked.append(metrics.pop("nonfinite"))
        return metrics

    def check(self) -> list[NonFinite]:
        """Reads what the steps since the last call found to be not finite; waits for them.

        Returns:
          The steps that were left out, where ``trainer.on_nonfinite`` is ``"skip"``.

        Raises:
          NonFiniteError: if there is any and it is ``"stop"``; it names the first one.
        """
        found = [code for codes in jax.device_get(self._unchecked) for code in np.atleast_1d(codes)]
        first = self.step - len(found) + 1
        self._unchecked = []
        steps = [NonFinite(first + i, _WORDS[CHECKED[code - 1]]) for i, code in enumerate(found) if code]
        if steps and self.trainer.on_nonfinite == "stop":
            raise NonFiniteError(f"step {steps[0].step}: {steps[0].what} not finite")
        return steps


def zero_shot_quantize(
    trainer: Trainer, teacher: Variables, *, epochs: int, devices: Sequence[jax.Device] | None = None
) -> Variables:
    """Quantizes any Flax classifier without data and returns the student's variables.

    They have the structure of the teacher's, but for activation ranges that are kept, and are used with
    ``quantize(trainer.model, trainer.spec).apply``. Parameters are float32 at least: in a narrower dtype they
    could not have moved.

    Args:
      trainer: model, generator, and how to quantize and train.
      teacher: the trained variables of ``trainer.model``.
      epochs: of ``trainer.optimizers.steps_per_epoch`` steps, warm-up included.
      devices: to spread the batch over; by default all, those of other processes included.

    Raises:
      InputError: if the batch does not divide evenly over the devices, or no epoch is left after
        the warm-up, or if generator, model and teacher do not fit together, or if what the model returns are
        not logits.
      NonFiniteError: for a step with a loss or parameter that is not finite, unless
        ``trainer.on_nonfinite`` is ``"skip"``.
    """
    o = trainer.optimizers
    if type(epochs) is not int or epochs <= o.warmup_epochs:
        raise InputError(f"epochs: got {epochs!r}, allowed are whole numbers above the warm-up's {o.warmup_epochs}")
    if o.cosine_epochs not in (0, epochs):
        raise InputError(
            f"epochs: got {epochs}, allowed is OptimizerSettings.cosine_epochs, {o.cosine_epochs}, "
            "at whose end the student's rate is zero"
        )
    _check_fit(trainer, nn.meta.unbox(teacher))
    run = JointRun(trainer, teacher, devices or jax.devices())
    total = epochs * o.steps_per_epoch
    with Progress(total) as progress:
        for step in range(total):
            run.advance(warmup=step < o.warmup_epochs * o.steps_per_epoch)
            progress.update(step + 1)
            if run.step % o.steps_per_epoch == 0:
                run.check()
    return _boxed_as(teacher, jax.device_get(run.state.result))


def _boxed_as(teacher: Variables, student: Variables) -> Variables:
    """``student`` with what ``teacher`` has in boxes (``flax.linen.Partitioned``) in such, too."""
    boxed = {name: nn.meta.replace_boxed(flax.core.unfreeze(teacher[name]), student[name]) for name in teacher}
    return {**student, **boxed}


def _check_fit(trainer: Trainer, teacher: Variables) -> None:
    """Raises an ``InputError`` if the model cannot label what the generator makes with the teacher's variables."""
    if not isinstance(teacher, Mapping) or "params" not in teacher:
        raise InputError(f"teacher: got {type(teacher).__name__}, allowed are variables with a collection 'params'")
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(teacher)):
        if not np.isfinite(np.asarray(leaf)).all():
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"teacher: {where} holds NaN or infinity, allowed are finite numbers")
    generator, model, mode = trainer.generator, trainer.model, evaluation_mode(trainer.model)
    shape = generator.image_size, generator.image_size, generator.channels
    images = jax.ShapeDtypeStruct((2, *shape), trainer.dtype)
    try:
        logits = jax.eval_shape(lambda v, x: model.apply(v, x, **mode), dict(teacher), images)
    except Exception as error:  # whatever Flax and the model itself say
        reason = " ".join(str(error).split())
        raise InputError(f"teacher: the model cannot take it, or images of shape {images.shape}: {reason}") from error
    if not hasattr(logits, "shape"):
        raise InputError(
            f"Trainer.model: {type(model).__name__} returns a {type(logits).__name__}, allowed is one array of logits "
            "(N, C); wrap it in a module whose call returns the logits alone"
        )
    if logits.shape != (2, generator.classes):
        raise InputError(
            f"Generator.classes: got {generator.classes}, but the model's logits of two images have the shape "
            f"{logits.shape}"
        )
    _check_logits(trainer, teacher, shape)
    _LOGGER.info("%s", quantize(model, trainer.spec).shares(dict(teacher), images, **mode))


def _check_logits(trainer: Trainer, teacher: Variables, shape: tuple[int, int, int]) -> None:
    """Raises an ``InputError`` if what the model returns are probabilities."""
    mode = evaluation_mode(trainer.model)
    images = np.random.default_rng(0).standard_normal((_IMAGES_LOOKED_AT, *shape)).astype(trainer.dtype)
    apply = jax.jit(lambda v, x: trainer.model.apply(v, x, **mode), compiler_options=COMPILED_FAST)
    outputs = np.asarray(apply(dict(teacher), images), np.float64)
    add_up_to_1 = (outputs >= 0).all() and np.allclose(outputs.sum(-1), 1, atol=0.02)
    if add_up_to_1 or ((outputs > 0) & (outputs < 1)).all():
        function = "softmax" if add_up_to_1 else "sigmoid"
        raise InputError(
            f"Trainer.model: {type(trainer.model).__name__} returns probabilities, from 0 to 1, allowed are logits, as "
            f"they are before the {function}: leave that out of the model, or wrap it in a module that returns the log "
            "of the probabilities"
        )
