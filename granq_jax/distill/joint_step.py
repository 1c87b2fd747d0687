"""The joint step: one update of generator and student, pure, and its mapped form.

Data flow of a step (in order, each computed once; the way from L_G back through the student only where L_G depends
on it)::

    z, labels --generator--> images --teacher--> t, moments of its batch norms' inputs
                                    --student--> s
    L_G(t, moments, s) --pull back through teacher and student--> images --> generator
    L_S(t, s)          --pull back through the same student pass--> student

The generator moves first in the released code, but the student then learns from the images it had
made before; so both losses share one forward pass, and their gradients are two pullbacks of it.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from granq_jax.distill.losses import wide
from granq_jax.distill.objectives import feature_maps, generator_loss, student_loss
from granq_jax.distill.trainer import AVERAGE, Trainer, TrainState, Variables, evaluation_mode, random_key
from granq_jax.errors import InputError
from granq_jax.models.layers import batch_moments, moments_of_all
from granq_jax.quant import RANGES, QuantizedModel, in_full_precision, quantize
from granq_jax.runtime.devices import AXIS, SMALL, mean_over_devices
from granq_jax.runtime.platforms import multiplied_in, traced_for

# Loss terms, and the networks whose parameters, must be finite after a step; causes before effects.
CHECKED = ("hinge", "onehot", "bns", "loss_g", "loss_s", "generator", "student")


def sample_noise(trainer: Trainer, step: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noise (n, latent) and labels (n,) of the samples ``index`` (n,) of the global batch.

    They depend on (seed, step, index) only, so that any division of a batch over devices trains on
    the same samples.
    """
    key = jax.random.fold_in(random_key(trainer.seed), step)

    def one(index):
        noise_key, label_key = jax.random.split(jax.random.fold_in(key, index))
        z = jax.random.normal(noise_key, (trainer.latent,), trainer.dtype)
        return z, jax.random.randint(label_key, (), 0, trainer.generator.classes)

    return jax.vmap(one)(index)


def apply_with_moments(
    model: QuantizedModel, variables: Variables, images: jax.Array, axis_name: str | None = None
) -> tuple[tuple[jax.Array, Variables], tuple[jax.Array, ...]]:
    """Logits of a model in evaluation mode, with the moments of its batch norms' inputs, and its activations.

    Returns:
      Logits (N, C) and a tree with ``{"mean": (C,), "var": (C,)}`` (biased variance, over all
      devices) at the path of every batch norm called, each wrapped in a tuple of calls;
      and the activations.
    """
    logits, moments, _, activations = _apply_with_statistics(model, variables, images, axis_name)
    return (logits, moments), activations


def _apply_with_statistics(model, variables, images, axis_name):
    """Logits, moments, the running statistics that belong to them (of the same structure), and activations."""
    logits, norms, activations = model.apply_and_watch(
        _batch_norm_statistics, variables, images, **evaluation_mode(model.model)
    )

    def of_norms(mean, var):
        calls: dict[tuple[str, ...], tuple[jax.Array, ...]] = collections.defaultdict(tuple)
        for norm in norms:
            for name, array in (("mean", norm.arrays[mean]), ("var", norm.arrays[var])):
                calls[*filter(None, norm.path.split("/")), name] += (array,)
        return flax.traverse_util.unflatten_dict(calls)

    moments, running = of_norms("mean", "var"), of_norms("running_mean", "running_var")
    return logits, moments if axis_name is None else _of_all_devices(moments, axis_name), running, activations


def _batch_norm_statistics(module: nn.Module, x: jax.Array) -> dict[str, jax.Array] | None:
    """Moments of the input of a module that is a batch norm, and the running ones; else ``None``.

    A batch norm is what has a mean and a variance for each channel in ``batch_stats``, and no weight or
    module in it, whatever its class: many projects have a copy of Flax's.
    """
    variables = module.variables
    own = variables.get("batch_stats", {})
    names = statistics_names(own)
    if names is None:
        return None
    mean, var = (own[name] for name in names)
    axis = getattr(module, "axis", -1)
    if axis not in (-1, x.ndim - 1):
        raise InputError(f"BatchNorm.axis: got {axis} at {'/'.join(module.path)}, allowed is -1")
    has_parts = any(isinstance(part, Mapping) or part.ndim > 1 for part in variables.get("params", {}).values())
    if has_parts or mean.shape != x.shape[-1:]:
        return None
    moments = dict(zip(("mean", "var"), batch_moments(wide(x)), strict=True))
    return {**moments, "running_mean": mean, "running_var": var}


def statistics_names(collection: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of a mean and a variance among a module's own statistics, if there is one of each.

    Examples:
      >>> statistics_names({"running_var": jnp.ones(2), "running_mean": jnp.ones(2), "u": jnp.ones(2)})
      ('running_mean', 'running_var')
    """
    own = [name for name, value in collection.items() if not isinstance(value, Mapping)]
    means, variances = ([name for name in own if part in name.lower()] for part in ("mean", "var"))
    return (means[0], variances[0]) if len(means) == len(variances) == 1 else None


def _check_all_seen(trainer: Trainer, batch_stats: Variables, moments: Variables) -> None:
    """Raises an ``InputError`` if there are statistics that the generator would not be guided by."""
    seen = {path[:-1] for path in flax.traverse_util.flatten_dict(moments)}
    unseen = dict.fromkeys(
        "/".join(path[:-1])
        for path in flax.traverse_util.flatten_dict(batch_stats)
        if any(part in path[-1].lower() for part in ("mean", "var")) and path[:-1] not in seen
    )
    if trainer.losses.gamma and unseen:
        raise InputError(
            f"LossSettings.gamma: got {trainer.losses.gamma}, but of the teacher's batch norms these were not seen: "
            f"{', '.join(unseen)}; allowed is 0, or a model in which each is a module of its own, called on (N, ..., C)"
        )


def _of_all_devices(moments: Variables, axis_name: str) -> Variables:
    """All of them at once: the devices need not wait for each other at every batch norm."""
    flat = flax.traverse_util.flatten_dict(moments)
    mean, var = ({path[:-1]: x for path, x in flat.items() if path[-1] == kind} for kind in ("mean", "var"))
    mean, var = moments_of_all(mean, var, axis_name)
    return flax.traverse_util.unflatten_dict(
        {(*path, kind): x for kind, tree in (("mean", mean), ("var", var)) for path, x in tree.items()}
    )


def update(
    trainer: Trainer,
    warmup: bool,
    state: TrainState,
    teacher: Variables,
    z: jax.Array,
    labels: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on given noise and labels: a pure function.

    Args:
      trainer: static.
      warmup: static; if true, only the generator moves.
      state: before the step.
      teacher: the teacher's variables.
      z: noise (n, latent), this device's share.
      labels: (n,).
      axis_name: mapped axis that splits the batch.

    Returns:
      The state after the step, and the scalars ``loss_g``, ``loss_s``, ``hinge``, ``onehot``,
      ``bns``, ``lr_g`` and ``lr_s`` of the whole batch, and ``nonfinite``: 0, or the place from 1 in
      :data:`CHECKED` of the first that is not finite. Both are equal on all devices. Where
      ``trainer.on_nonfinite`` is ``"skip"``, such a step changes nothing but counters.

    Raises:
      InputError: if the model's logits do not fit the generator's classes.
    """
    generator = trainer.generator.copy(axis_name=axis_name)
    quantized = quantize(trainer.model, trainer.spec, impl=trainer.impl, axis_name=axis_name)
    in_full = quantize(trainer.model, in_full_precision(trainer.spec), impl="xla")
    # The ranges that are kept move in the warm-up, and stay for the student to learn with.
    moving = [RANGES] if warmup and RANGES in state.student else False

    def make_images(params):
        variables = {**state.generator, "params": params}
        return generator.apply(variables, z, labels, mutable=["batch_stats"])

    def maps_of(activations):
        return feature_maps(activations) if trainer.losses.attention else ()

    def run_teacher(images):
        logits, moments, running, activations = _apply_with_statistics(in_full, teacher, images, axis_name)
        return (_checked_logits(trainer, logits), moments), (maps_of(activations), running)

    def run_student(params, images):
        variables = {**state.student, "params": params}
        outputs, activations = quantized.apply_with_activations(
            variables, images, **evaluation_mode(trainer.model), mutable=moving
        )
        logits, ranges = outputs if moving else (outputs, {})
        return (_checked_logits(trainer, logits), maps_of(activations)), ranges

    images, pull_generator, generator_stats = jax.vjp(make_images, state.generator["params"], has_aux=True)
    (t, moments), pull_teacher, (teacher_maps, running) = jax.vjp(run_teacher, images, has_aux=True)
    # The way back through the student to the images is the generator's; where it does not look, that is not computed.
    watched = trainer.losses.watches_student
    to_learn = (state.student["params"], images) if watched else (state.student["params"],)
    (s, maps), pull_student, ranges = jax.vjp(
        lambda params, images=images: run_student(params, images), *to_learn, has_aux=True
    )
    if t.shape != (len(labels), generator.classes):
        raise InputError(
            f"Generator.classes: got {generator.classes}, but {type(trainer.model).__name__} turns a batch of "
            f"{len(labels)} images into an array of shape {t.shape}; allowed is its number of classes"
        )

    _check_all_seen(trainer, teacher.get("batch_stats", {}), moments)
    loss_g = partial(generator_loss, trainer.losses, labels=labels, running=running)
    (value_g, terms), (to_t, to_moments, to_s) = jax.value_and_grad(
        lambda t, moments, s: loss_g(t, moments, s, axis_name=axis_name), argnums=(0, 1, 2), has_aux=True
    )(t, moments, s)
    (to_images,) = pull_teacher((to_t, to_moments))
    if watched:
        to_images = to_images + pull_student((to_s, jax.tree.map(jnp.zeros_like, maps)))[1]
    (generator_grads,) = pull_generator(to_images)

    value_s, to_student = jax.value_and_grad(
        lambda s, maps: student_loss(trainer.losses, t, s, labels, teacher_maps, maps, axis_name),
        argnums=(0, 1),
    )(s, maps)
    metrics = {"loss_g": value_g, "loss_s": value_s, **terms}
    student_grads = None if warmup else pull_student(to_student)[0]

    # Every device's loss is the mean over its own samples, and a collective in a forward pass
    # carries cotangents from all devices: the mean of the gradients is that of the mean loss.
    generator_grads, student_grads, metrics = mean_over_devices((generator_grads, student_grads, metrics), axis_name)
    # Parameters change when nothing reads them any more: then XLA need not copy them first.
    generator_grads, student_grads = jax.lax.optimization_barrier((generator_grads, student_grads))
    generator_params, generator_opt = _apply_gradients(
        trainer.generator_optimizer, generator_grads, state.generator["params"], state.generator_opt
    )
    state_after = state.replace(
        step=state.step + 1,
        generator={**generator_stats, "params": generator_params},
        generator_opt=generator_opt,
        student={**state.student, **ranges},
    )
    if not warmup:
        student_params, student_opt = _apply_gradients(
            trainer.student_optimizer, student_grads, state.student["params"], state.student_opt
        )
        student = {**state.student, "params": student_params}
        if decay := trainer.optimizers.student_ema_decay:
            student[AVERAGE] = optax.incremental_update(student_params, state.student[AVERAGE], 1 - decay)
        state_after = state_after.replace(student=student, student_opt=student_opt)
    parameters = {"generator": generator_params, "student": state_after.student["params"]}
    nonfinite = _first_nonfinite([(metrics | parameters)[name] for name in CHECKED])
    if trainer.on_nonfinite == "skip":
        state_after = jax.tree.map(partial(_keep_unless, nonfinite == 0), state, state_after)
    rates = {"lr_g": trainer.generator_schedule(state.step), "lr_s": trainer.student_schedule(state.step)}
    rates = {name: jnp.asarray(rate, t.dtype) for name, rate in rates.items()}
    return state_after, {**metrics, **rates, "nonfinite": nonfinite}


def _checked_logits(trainer: Trainer, logits: Any) -> jax.Array:
    """Logits as the losses take them: an array, in float32 at least."""
    if not hasattr(logits, "shape"):
        raise InputError(
            f"Trainer.model: {type(trainer.model).__name__} returns a {type(logits).__name__}, allowed is one array of "
            "logits (N, C); wrap it in a module whose call returns the logits alone"
        )
    return wide(logits)


def step(
    trainer: Trainer,
    warmup: bool,
    state: TrainState,
    teacher: Variables,
    index: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """:func:`update` on the noise and labels of the samples ``index`` (n,) of this step's batch."""
    z, labels = sample_noise(trainer, state.step, index)
    return update(trainer, warmup, state, teacher, z, labels, axis_name)


def mapped_step(trainer: Trainer, warmup: bool, devices: Sequence[jax.Device], steps: int = 1) -> Any:
    """:func:`step` over ``devices``: a function of (state, teacher, index) with ``state`` donated.

    ``state`` and ``teacher`` are whole on every device, ``index`` (devices, n) is split by its first
    axis; see :func:`granq_jax.runtime.devices.place`.

    With more than one of ``steps`` it takes so many in a row; the metrics are those of the last one, and
    ``nonfinite`` is that of each, (steps,).
    """

    def on_them(state, teacher, index):
        with traced_for(devices), multiplied_in(trainer.precision):
            if steps == 1:
                return step(trainer, warmup, state, teacher, index, axis_name=AXIS)
            state, metrics = jax.lax.scan(
                lambda state, _: step(trainer, warmup, state, teacher, index, axis_name=AXIS), state, length=steps
            )
            nonfinite = metrics.pop("nonfinite")
            return state, {**{name: values[-1] for name, values in metrics.items()}, "nonfinite": nonfinite}

    return jax.pmap(
        on_them,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )


def _first_nonfinite(trees):
    def all_finite(tree):
        leaves = [x.ravel() for x in jax.tree.leaves(tree)]
        joined = [jnp.concatenate(small)] if (small := [x for x in leaves if x.size < SMALL]) else []
        return jnp.stack([jnp.isfinite(x).all() for x in joined + [x for x in leaves if x.size >= SMALL]]).all()

    finite = jnp.stack([all_finite(tree) for tree in trees])
    return jnp.where(finite.all(), 0, 1 + jnp.argmin(finite)).astype(jnp.int32)


def _keep_unless(accepted, before, after):
    """Counters move on in any case: noise and learning rates are functions of them."""
    return jnp.where(accepted, after, before) if jnp.issubdtype(after.dtype, jnp.inexact) else after


def _apply_gradients(optimizer, gradients, params, opt_state):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
