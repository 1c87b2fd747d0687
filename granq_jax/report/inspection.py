"""A look inside a run: images of its generator, and what quantization does to the student on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np

from granq_jax.distill.trainer import Trainer, TrainState, Variables, evaluation_mode, random_key
from granq_jax.quant import ActivationStorage, Observation, Shares, activation_storage, quantize, storage_bytes
from granq_jax.runtime.memory import without_collecting
from granq_jax.runtime.platforms import traced_for

CLASSES_SHOWN = 10
# At 224 pixels an image's activations take up to 50 MB.
_SMALL_IMAGE, _IMAGES_A_CLASS = 64, {True: 8, False: 2}


class Inspection(NamedTuple):
    """What is seen of a state.

    Attributes:
      images: generated, (classes, images a class, H, W, C), normalised as the networks take them.
      classes: their labels, (classes,).
      observations: of every weight, and of every activation on these images; on the host.
      others: parameters of one dimension, which stay in full precision: (arrays, numbers in them) by name.
      storage: see :func:`granq_jax.quant.storage_bytes`.
      activation_storage: see :func:`granq_jax.quant.activation_storage`.
      shares: how much of the student is quantized.
    """

    images: np.ndarray
    classes: np.ndarray
    observations: tuple[Observation, ...]
    others: dict[str, tuple[int, int]]
    storage: dict[str, int]
    activation_storage: ActivationStorage
    shares: Shares


def inspector(trainer: Trainer, teacher: Variables) -> Callable[[TrainState], Inspection]:
    """A function from a run's state to what is seen of it; compiled when it is first called.

    The noise is always the same, so that what two states make of it can be compared. Labels are up
    to ``CLASSES_SHOWN`` classes, evenly spaced.
    """
    generator, quantized = trainer.generator, quantize(trainer.model, trainer.spec, impl=trainer.impl)
    mode = evaluation_mode(trainer.model)
    shown = min(CLASSES_SHOWN, generator.classes)
    a_class = _IMAGES_A_CLASS[generator.image_size <= _SMALL_IMAGE]
    classes = np.arange(shown, dtype=np.int32) * generator.classes // shown
    labels = np.repeat(classes, a_class)

    @jax.jit
    def inspect(generator_variables, teacher, student_variables):
        # A stream of its own: not that of the steps, nor of the generator's weights.
        key = jax.random.fold_in(random_key(trainer.seed), 2**31 - 2)
        z = jax.random.normal(key, (len(labels), trainer.latent), trainer.dtype)
        with traced_for(jax.local_devices()):
            images, _ = generator.apply(generator_variables, z, labels, mutable=["batch_stats"])
            return images, quantized.observe(teacher, student_variables, images, **mode)

    def look(state: TrainState) -> Inspection:
        # From the host: the state may be spread over devices, of which one is enough here.
        student = state.result
        variables = jax.device_get((state.generator, teacher, student))
        with without_collecting():
            images, observations = jax.device_get(inspect(*variables))
            call = variables[-1], images[:1]
            layouts, shares = quantized.layouts(*call, **mode), quantized.shares(*call, **mode)
        return Inspection(
            images.reshape(shown, a_class, *images.shape[1:]),
            classes,
            observations,
            _other_parameters(student["params"]),
            storage_bytes(student, trainer.spec, layouts),
            activation_storage(
                [(o.site.path, o.site.plain_shape) for o in observations if o.site.kind == "activation"], trainer.spec
            ),
            shares,
        )

    return look


def _other_parameters(params: Variables) -> dict[str, tuple[int, int]]:
    others: dict[str, tuple[int, int]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        if leaf.ndim < 2:
            name = path[-1]
            arrays, numbers = others.get(name, (0, 0))
            others[name] = arrays + 1, numbers + leaf.size
    return others
