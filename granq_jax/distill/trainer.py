"""What a run of joint steps is made of: settings, optimizers, and the state that the steps change."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from granq_jax.distill import schedules
from granq_jax.distill.losses import wide
from granq_jax.distill.settings import LARGEST, LossSettings, OptimizerSettings
from granq_jax.errors import InputError, InputTypeError, check_settings, choice, setting, whole
from granq_jax.models.generator import Generator
from granq_jax.quant import RANGES, QuantSpec, quantize
from granq_jax.quant.dispatch import IMPLEMENTATIONS
from granq_jax.quant.quantized_model import check_linen
from granq_jax.runtime.compilation_cache import COMPILED_FAST
from granq_jax.runtime.platforms import PRECISIONS, multiplied_in, traced_for

Variables = Mapping[str, Any]
AVERAGE = "granq_average"  # the collection of the student's averaged parameters, where they are kept
ON_NONFINITE = ("stop", "skip")

# Arguments by which models are told what they are called for, and what they are given to evaluate.
_EVALUATION = {
    **dict.fromkeys(("train", "training", "is_training", "is_train"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "eval", "is_eval"), True),
}


def evaluation_mode(model: nn.Module) -> dict[str, Any]:
    """The arguments with which a model is called to evaluate: ``{"train": False}``, or what its call names it.

    Known are ``train``, ``training``, ``is_training``, ``is_train``, and the other way round ``deterministic``,
    ``use_running_average``, ``inference``, ``eval`` and ``is_eval``. Of a call that takes any (``**kwargs``), those
    whose names stand in it.

    Raises:
      InputError: if the call needs another argument beside the images.

    Examples:
      >>> evaluation_mode(nn.Dense(3)), evaluation_mode(nn.Dropout(0.5))
      ({}, {'deterministic': True})
    """
    call = inspect.unwrap(type(model).__call__)
    _, *others = inspect.signature(call).parameters.values()  # all but self
    named = {p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in others):
        named |= set(call.__code__.co_consts)
    needed = [p.name for p in others[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if unknown := [name for name in needed if name not in _EVALUATION]:
        raise InputError(
            f"Trainer.model: the call of {type(model).__name__} needs {', '.join(unknown)} beside the images, allowed "
            f"are {', '.join(_EVALUATION)}; wrap it in a module whose call gives the rest"
        )
    return {name: value for name, value in _EVALUATION.items() if name in named}


def random_key(seed: int) -> jax.Array:
    """A key of the generator that is the same everywhere, whatever JAX's default is set to.

    Others, ``"rbg"`` among them, give a sample other noise when it is drawn in another batch.
    """
    return jax.random.key(seed, impl="threefry2x32")


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes: a pytree.

    Attributes:
      step: number of steps taken, int32.
      generator: its variables.
      student: its variables; the teacher's tree, and where they are kept the ranges of its activations and
        the moving average of its parameters.
      generator_opt: optimizer state.
      student_opt: optimizer state.
    """

    step: jax.Array
    generator: Variables
    student: Variables
    generator_opt: optax.OptState
    student_opt: optax.OptState

    @property
    def result(self) -> Variables:
        """The student that a run gives: with the averaged parameters where there are any."""
        if AVERAGE not in self.student:
            return self.student
        collections = {name: collection for name, collection in self.student.items() if name != AVERAGE}
        return {**collections, "params": self.student[AVERAGE]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a run of joint steps is made of; everything in it is fixed while it lasts.

    Attributes:
      model: the teacher's module, which is the student's too.
      generator: the generator's module; its ``axis_name`` is set here.
      spec: how the student is quantized.
      impl: how its ``fake_quant`` is computed, see :func:`granq_jax.fake_quant`.
      losses: weights of the loss terms.
      optimizers: learning rates.
      batch_size: samples a step, over all devices.
      latent: length of a noise vector.
      seed: of noise and labels.
      dtype: of noise, and so of generator and images.
      on_nonfinite: what becomes of a step with a loss or parameter that is not finite: ``"stop"``
        ends the run, ``"skip"`` leaves the step out.
      precision: of products and convolutions, see :func:`granq_jax.runtime.platforms.multiplied_in`.

    Raises:
      ValueError, TypeError: for a value that is not allowed.
    """

    model: nn.Module
    generator: Generator
    spec: QuantSpec
    impl: str = setting("auto", choice(*IMPLEMENTATIONS))
    losses: LossSettings = dataclasses.field(default_factory=LossSettings)
    optimizers: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    batch_size: int = setting(16, whole(2, LARGEST))
    latent: int = setting(100, whole(1, LARGEST))
    seed: int = setting(0, whole(0, 2**31 - 1))
    dtype: Any = jnp.float32
    on_nonfinite: str = setting("stop", choice(*ON_NONFINITE))
    precision: str = setting("default", choice(*PRECISIONS))

    def __post_init__(self) -> None:
        check_linen("Trainer.model", self.model)
        kinds = {
            "generator": Generator,
            "spec": QuantSpec,
            "losses": LossSettings,
            "optimizers": OptimizerSettings,
        }
        for field, kind in kinds.items():
            if not isinstance(value := getattr(self, field), kind):
                raise InputTypeError(f"Trainer.{field}: got {type(value).__name__}, allowed is {kind.__name__}")
        if self.generator.classes < 2:
            raise InputError(
                f"Generator.classes: got {self.generator.classes}, allowed are whole numbers from 2: softmax over a "
                "single class is always 1, so that nothing can be learned from it; make two of a logit z, (0, z)"
            )
        if jnp.dtype(self.dtype).name not in ("float32", "float64"):
            raise InputError(
                f"Trainer.dtype: got {jnp.dtype(self.dtype).name}, allowed are float32 and float64: the generator's "
                "parameters have it too, and cannot learn in less; the model may compute in any"
            )
        check_settings(self)
        if self.spec.act_ranges == "moving_average" and not self.optimizers.warmup_epochs:
            raise InputError(
                "OptimizerSettings.warmup_epochs: got 0 with QuantSpec.act_ranges='moving_average', whose ranges are "
                "measured in the warm-up; allowed are whole numbers from 1"
            )

    @property
    def generator_schedule(self) -> optax.Schedule:
        """Learning rate of the generator by global step."""
        o = self.optimizers
        return schedules.step_decay(o.generator_lr, o.decay_epochs, o.steps_per_epoch)

    @property
    def student_schedule(self) -> optax.Schedule:
        """Learning rate of the student by global step."""
        return self._student_schedule(0)

    def _student_schedule(self, first_step: int) -> optax.Schedule:
        """The same by the steps from the global step ``first_step`` on."""
        o = self.optimizers
        decaying = schedules.step_decay(o.student_lr, o.decay_epochs, o.steps_per_epoch, first_step)
        if not o.cosine_epochs:
            return decaying
        warmup, steps = (epochs * o.steps_per_epoch for epochs in (o.warmup_epochs, o.cosine_epochs))
        cosine = optax.cosine_decay_schedule(1.0, steps - warmup)
        return lambda count: decaying(count) * cosine(jnp.maximum(count + first_step - warmup, 0))

    @property
    def generator_optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        b1, b2 = self.optimizers.generator_betas
        return optax.adam(self.generator_schedule, b1=b1, b2=b2)

    @property
    def student_optimizer(self) -> optax.GradientTransformation:
        """SGD with Nesterov momentum, or Adam, and weight decay; it first moves when the warm-up is over."""
        o = self.optimizers
        schedule = self._student_schedule(o.warmup_epochs * o.steps_per_epoch)
        if o.student_optimizer == "adam":
            optimizer = optax.adam(schedule, b1=o.student_momentum)
        else:
            optimizer = optax.sgd(schedule, momentum=o.student_momentum, nesterov=True)
        return optax.chain(optax.add_decayed_weights(o.student_weight_decay), optimizer)

    def init(self, teacher: Variables) -> TrainState:
        """The state before the first step: a random generator, and the teacher as student.

        The student's parameters are float32 at least: what a step adds is less than bfloat16 resolves.
        """
        return self._jitted_first_state(nn.meta.unbox(dict(teacher)))

    def state_shapes(self, teacher: Variables) -> TrainState:
        """What :meth:`init` gives as ``jax.ShapeDtypeStruct``s; ``teacher`` may consist of such too."""
        shapes: TrainState = self._jitted_first_state.eval_shape(nn.meta.unbox(dict(teacher)))
        return shapes

    @functools.cached_property
    def _jitted_first_state(self) -> Any:  # one, so that its trace serves both
        return jax.jit(self._first_state, compiler_options=COMPILED_FAST)

    def _first_state(self, teacher: dict[str, Any]) -> TrainState:
        # A stream of its own, so that the weights do not repeat the noise of the steps.
        key = jax.random.fold_in(random_key(self.seed), 2**31 - 1)
        z, labels = jnp.zeros((2, self.latent), self.dtype), jnp.zeros((2,), jnp.int32)
        with traced_for(()):  # its images are not used, so that any platform's form will do
            generator = self.generator.init(key, z, labels)
        student = jax.tree.map(jnp.copy, flax.core.unfreeze(teacher))  # which steps may overwrite
        student["params"] = jax.tree.map(wide, student["params"])
        if self.spec.act_ranges == "moving_average":
            with multiplied_in(self.precision):
                student |= self._first_ranges(generator, student, jax.random.fold_in(key, 1))
        if self.optimizers.student_ema_decay:
            student[AVERAGE] = jax.tree.map(jnp.copy, student["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            generator=generator,
            student=student,
            generator_opt=self.generator_optimizer.init(generator["params"]),
            student_opt=self.student_optimizer.init(student["params"]),
        )

    def _first_ranges(self, generator: Variables, student: Variables, key: jax.Array) -> Variables:
        """Where the moving averages begin: ranges on images of the generator as it is, by their collection's name."""
        quantized = quantize(self.model, self.spec, impl=self.impl)
        z = jax.random.normal(key, (self.batch_size, self.latent), self.dtype)
        labels = jnp.arange(self.batch_size) % self.generator.classes
        images, _ = self.generator.apply(generator, z, labels, mutable=["batch_stats"])
        return quantized.apply(student, images, **evaluation_mode(self.model), mutable=[RANGES])[1]
