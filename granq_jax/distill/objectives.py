"""L_G and L_S: the terms of `losses`, put together as `LossSettings` say."""

from __future__ import annotations

from collections.abc import Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp

from granq_jax.distill import losses
from granq_jax.distill.settings import LossSettings
from granq_jax.distill.trainer import Variables
from granq_jax.errors import InputError


def generator_loss(
    settings: LossSettings,
    teacher: jax.Array,
    moments: Variables,
    student: jax.Array,
    labels: jax.Array,
    running: Variables,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_G and its terms ``hinge``, ``onehot`` and ``bns`` (each before its weight).

    Args:
      settings: the objective and the weights of the terms. ``hinge`` of ``"gdfq"`` is 0, ``onehot`` the
        cross-entropy of the teacher.
      teacher: logits (N, C).
      moments: of the teacher's batch norms, as :func:`granq_jax.distill.joint_step.apply_with_moments` returns them.
      student: logits (N, C).
      labels: (N,).
      running: the teacher's ``batch_stats``; or, of the structure of ``moments``, those of each call.
      axis_name: mapped axis that splits the batch.

    Raises:
      InputError: if BNS has a weight but the teacher no batch norm.
    """
    if settings.objective == "gdfq":
        hinge = jnp.zeros((), losses.wide(teacher).dtype)
        onehot = losses.label_cross_entropy(teacher, labels)
    else:
        # A term without a weight is left out: times 0 it would still be computed.
        hinge = onehot = jnp.zeros((), losses.wide(teacher).dtype)
        if settings.hinge:
            hinge = losses.balance_hinge(teacher, student, settings.lambda_lower, settings.lambda_upper, axis_name)
        if settings.alpha_ds:
            onehot = onehot + settings.alpha_ds * losses.discrepancy(teacher, student, labels)
        if settings.alpha_as:
            onehot = onehot + settings.alpha_as * losses.agreement(teacher, student, labels)
        if settings.alpha_label:
            onehot = onehot + settings.alpha_label * losses.label_cross_entropy(teacher, labels)
    flat_moments, flat_running = (flax.traverse_util.flatten_dict(tree) for tree in (moments, running))

    def of_calls(statistics, count):
        return statistics if isinstance(statistics, tuple) else (statistics,) * count

    calls = [
        pairs
        for *path, leaf in flat_moments
        if leaf == "mean"
        for pairs in zip(
            zip(flat_moments[*path, "mean"], flat_moments[*path, "var"], strict=True),
            zip(
                *(of_calls(flat_running[*path, name], len(flat_moments[*path, name])) for name in ("mean", "var")),
                strict=True,
            ),
            strict=True,
        )
    ]
    if settings.gamma and not calls:
        raise InputError(
            f"LossSettings.gamma: got {settings.gamma}, allowed is 0 only: no batch norm was called in the teacher, "
            "whose statistics the term compares"
        )
    bns = losses.batch_norm_statistics(*zip(*calls, strict=True)) if calls else jnp.zeros((), hinge.dtype)
    loss = hinge + settings.beta * onehot + settings.gamma * bns
    return loss, {"hinge": hinge, "onehot": onehot, "bns": bns}


def student_loss(
    settings: LossSettings,
    teacher: jax.Array,
    student: jax.Array,
    labels: jax.Array,
    teacher_maps: Sequence[jax.Array],
    student_maps: Sequence[jax.Array],
    axis_name: str | None = None,
) -> jax.Array:
    """L_S, a scalar; the mean over devices is that of the whole batch.

    Args:
      settings: the objective, its temperature, and the weight of the attention distillation.
      teacher: logits (N, C).
      student: logits (N, C).
      labels: (N,).
      teacher_maps: see :func:`feature_maps`; not looked at where the attention has no weight.
      student_maps: the student's, as many.
      axis_name: mapped axis that splits the batch.
    """
    if settings.objective == "gdfq":
        loss = losses.label_distillation(teacher, student, labels, settings.temperature)
    else:
        loss = losses.distillation(teacher, student, settings.temperature)
    if settings.attention:
        # A sum over samples, where all else is a mean.
        weight = settings.attention * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        loss = loss + losses.attention_distillation(teacher_maps, student_maps, weight=weight)
    return loss


def feature_maps(activations: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The last activation (N, H, W, C) of each resolution: of a ResNet, the outputs of its stages.

    Examples:
      >>> sizes = (8, 8, 4, 4, 2)
      >>> [x.shape for x in feature_maps([jnp.zeros((1, size, size, i)) for i, size in enumerate(sizes)])]
      [(1, 8, 8, 1), (1, 4, 4, 3), (1, 2, 2, 4)]
    """
    return tuple({x.shape[1:3]: x for x in activations if x.ndim == 4}.values())
