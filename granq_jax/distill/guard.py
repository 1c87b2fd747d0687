"""The guard of a run: notices without data that a student breaks down, and chooses the student that a run gives.

When the warm-up ends, images are taken from the generator that no student will be trained on, as they are, shifted and
mirrored, and mixed in pairs: three sources. On each, a student's *error* is the median over the images of

    Var_c(t - s) / Var_c(t)

with the logits t of the teacher and s of the student and variances over the classes: what the distillation makes small,
where the distillation itself is measured on images that may chase the student. It is given relative to that of the
student before its training, and the worst source counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.distill.losses import wide
from granq_jax.distill.trainer import Trainer, Variables, evaluation_mode, random_key
from granq_jax.quant import quantize
from granq_jax.runtime.platforms import traced_for

# A student has broken down whose error is so many times the least before it, and greater than before its training.
LIMIT = 2.0
_SMALL_IMAGE, _IMAGES, _LARGE_IMAGES = 64, 256, 32
_SHIFT = 8  # an image's size over the pixels that it is shifted by at most


class Score(NamedTuple):
    """How far a student is from its teacher on held-out images.

    Attributes:
      error: the relative error on the worst source; 1 is that of the student before its training.
      agreement: percent of the images of all sources that teacher and student give the same class.
    """

    error: float
    agreement: float


def held_out_images(trainer: Trainer, generator: Variables) -> np.ndarray:
    """Images (sources, N, H, W, C) of a generator, from noise that is used for nothing else.

    Args:
      trainer: of the run.
      generator: the generator's variables.
    """
    size, classes = trainer.generator.image_size, trainer.generator.classes
    count = _IMAGES if size <= _SMALL_IMAGE else _LARGE_IMAGES

    @jax.jit
    def make(generator):
        # A stream of its own: not that of the steps, of the generator's weights, nor of what a report shows.
        noise, moves = jax.random.split(jax.random.fold_in(random_key(trainer.seed), 2**31 - 3))
        z = jax.random.normal(noise, (count, trainer.latent), trainer.dtype)
        with traced_for(jax.local_devices()):
            images, _ = trainer.generator.apply(generator, z, jnp.arange(count) % classes, mutable=["batch_stats"])
        return jnp.stack([images, _moved(moves, images), (images + jnp.roll(images, 1, 0)) / 2])

    return np.asarray(make(jax.device_get(generator)))


def _moved(key, images):
    """Images shifted by up to an eighth of their size, with their border repeated, and half of them mirrored."""
    most = images.shape[1] // _SHIFT
    shifts, sides = jax.random.split(key)
    around = ((0, 0), (most, most), (most, most), (0, 0))
    padded = jnp.pad(images, around, mode="edge")
    corners = jax.random.randint(shifts, (len(images), 2), 0, 2 * most + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    mirrored = jax.random.bernoulli(sides, 0.5, (len(images), 1, 1, 1))
    return (lambda x: jnp.where(mirrored, x[:, :, ::-1], x))(cut(padded, corners))


def scorer(trainer: Trainer, teacher: Variables, images: np.ndarray) -> Callable[[Variables], Score]:
    """A function from a student's variables to its :class:`Score` on ``images``.

    Args:
      trainer: of the run.
      teacher: the teacher's variables, which are the student's before its training.
      images: of :func:`held_out_images`.
    """
    student, mode = quantize(trainer.model, trainer.spec, impl=trainer.impl), evaluation_mode(trainer.model)

    @jax.jit
    def logits_of_teacher(variables, images):
        with traced_for(jax.local_devices()):
            return wide(jnp.asarray(trainer.model.apply(variables, images, **mode)))

    @jax.jit
    def logits_of_student(variables, images):
        with traced_for(jax.local_devices()):
            return wide(student.apply(variables, images, **mode))

    teacher = jax.device_get(dict(teacher))
    ts = [np.asarray(logits_of_teacher(teacher, source), np.float64) for source in images]

    def measure(variables):
        students = [np.asarray(logits_of_student(variables, source), np.float64) for source in images]
        errors = [np.median((t - s).var(-1) / np.maximum(t.var(-1), 1e-12)) for t, s in zip(ts, students, strict=True)]
        same = [(t.argmax(-1) == s.argmax(-1)).mean() for t, s in zip(ts, students, strict=True)]
        return np.array(errors), 100 * float(np.mean(same))

    before = np.maximum(measure(teacher)[0], 1e-12)

    def score(variables):
        errors, agreement = measure(jax.device_get(variables))
        return Score(float((errors / before).max()), agreement)

    return score


def scores_of(notes: Mapping[str, Any]) -> dict[int, Score]:
    """The scores among what a run has noted beside a checkpoint; runs of before there was a guard have none."""
    return {int(step): Score(*values) for step, values in notes.get("scores", {}).items()}


def breakdown(scores: Mapping[int, Score]) -> int | None:
    """The first step whose student has broken down, if there is one.

    Its error is ``LIMIT`` times the least before it, and greater than before its training. Of students that learn,
    errors go up and down by a third; and where many bits leave little to learn, they may rise at first.

    Examples:
      >>> breakdown({200: Score(0.5, 90.0), 400: Score(0.3, 92.0), 600: Score(0.9, 80.0), 800: Score(1.2, 60.0)})
      800
    """
    least = 1.0
    for step in sorted(scores):
        error = scores[step].error
        if not error <= max(1.0, LIMIT * least):  # NaN, too
            return step
        least = min(least, error)
    return None


def chosen(scores: Mapping[int, Score]) -> int | None:
    """The step whose student a run gives: the newest, of those before a breakdown; ``None`` if there is none.

    Examples:
      >>> chosen({200: Score(0.5, 90.0), 400: Score(0.3, 92.0), 600: Score(0.9, 80.0), 800: Score(1.2, 60.0)})
      600
    """
    end = breakdown(scores)
    return max((step for step in scores if end is None or step < end), default=None)
