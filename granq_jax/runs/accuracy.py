"""Accuracy on real images, of a float model and of a quantized student."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.data.splits import Split, batches
from granq_jax.distill.trainer import Trainer, Variables, evaluation_mode
from granq_jax.quant import quantize
from granq_jax.runtime.devices import AXIS, cores, place, sample_index
from granq_jax.runtime.platforms import multiplied_in, traced_for


class Accuracy(NamedTuple):
    """Shares of the images, in percent, whose label is the likeliest class, or among the five likeliest."""

    top1: float
    top5: float


# Batches computed side by side: what each needs beside the parameters is in memory that often.
_MAX_AT_ONCE = 4
Evaluation = Callable[[Variables], Accuracy]


def float_accuracy(
    model: nn.Module, split: Split, batch_size: int, devices: Sequence[jax.Device], precision: str = "default"
) -> Evaluation:
    """A function from a float model's variables to its accuracy on ``split``.

    ``precision`` is that of its products, see :func:`granq_jax.runtime.platforms.multiplied_in`.
    """
    mode = evaluation_mode(model)
    return _make_evaluation(lambda v, x: model.apply(v, x, **mode), split, batch_size, devices, precision)


def student_accuracy(trainer: Trainer, split: Split, batch_size: int, devices: Sequence[jax.Device]) -> Evaluation:
    """The same for the quantized student, in the trainer's precision.

    ``batch_size`` has no influence on the figure but by way of rounding, except for activation
    granularities whose ranges are shared between samples (``"tensor"`` and ``"channel"``).
    """
    student = quantize(trainer.model, trainer.spec, impl=trainer.impl, axis_name=AXIS)
    mode = evaluation_mode(trainer.model)
    return _make_evaluation(lambda v, x: student.apply(v, x, **mode), split, batch_size, devices, trainer.precision)


def percentages(subject: str, accuracy: Accuracy | None, suffix: str = "") -> dict[str, float | None]:
    """The fields of a result that say how accurate ``subject`` is; ``None`` if it was not evaluated.

    Examples:
      >>> percentages("teacher", Accuracy(91.7, 99.6))
      {'teacher_top1': 91.7, 'teacher_top5': 99.6}
    """
    values = (None, None) if accuracy is None else accuracy
    return {f"{subject}_{name}{suffix}": value for name, value in zip(Accuracy._fields, values, strict=True)}


def _make_evaluation(
    apply: Callable, split: Split, batch_size: int, devices: Sequence[jax.Device], precision: str
) -> Evaluation:
    share = sample_index(batch_size, devices, "eval_batch_size")

    def correct(variables, images, labels, weights):
        with traced_for(devices), multiplied_in(precision):
            logits = apply(variables, images)
        _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = likeliest == labels[:, None]
        counts = [jnp.sum(hits[:, :k].any(axis=1) * weights) for k in (1, 5)]
        return jax.lax.psum(jnp.stack(counts), AXIS)

    mapped = jax.pmap(correct, axis_name=AXIS, in_axes=(None, 0, 0, 0), out_axes=None, devices=devices)

    # XLA for CPUs computes most convolutions on one core, so that a batch for each core is faster than a batch on
    # all. The collectives of several devices must meet in the same order everywhere.
    at_once = min(cores(), _MAX_AT_ONCE) if devices[0].platform == "cpu" and len(devices) == 1 else 1

    def evaluate(variables):
        variables = place(variables, devices)

        def count(batch):
            parts = place([a.reshape(*share.shape, *a.shape[1:]) for a in batch], devices, split=True)
            return jax.device_get(mapped(variables, *parts))

        totals = np.zeros(2)  # a batch's counts are whole numbers that float32 holds exactly; their sum may not be
        with ThreadPoolExecutor(at_once, thread_name_prefix="evaluate") as threads:
            waiting: collections.deque[Future] = collections.deque()
            for batch in batches(split, batch_size, share.ravel()):
                # No more than these, so that batches do not pile up; the next one is decoded meanwhile.
                if len(waiting) == at_once:
                    totals += waiting.popleft().result()
                waiting.append(threads.submit(count, batch))
            totals += sum(future.result() for future in waiting)
        return Accuracy(*(100.0 * float(total) / len(split) for total in totals))

    return evaluate
