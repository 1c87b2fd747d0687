"""Supervised training of a full-precision teacher, for users who have no checkpoint but have data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from granq_jax.data.splits import Batch, Split, ahead
from granq_jax.distill.losses import wide
from granq_jax.distill.settings import PretrainSettings
from granq_jax.distill.trainer import Variables, evaluation_mode, random_key
from granq_jax.errors import InputError, RunError
from granq_jax.runtime.devices import AXIS, mean_over_devices, place, sample_index, settle
from granq_jax.runtime.progress import Progress


class PretrainState(flax.struct.PyTreeNode):
    """All that training changes: a pytree.

    Attributes:
      epoch: epochs completed, int32.
      variables: of the model.
      opt_state: of the optimizer.
    """

    epoch: jax.Array
    variables: Variables
    opt_state: optax.OptState


def pretrain(
    model: nn.Module,
    split: Split,
    settings: PretrainSettings,
    *,
    devices: Sequence[jax.Device] | None = None,
    restore: Callable[[PretrainState], PretrainState] = lambda start: start,
    after_epoch: Callable[[PretrainState, float], None] = lambda state, loss: None,
) -> Variables:
    """Trains ``model`` on ``split`` and returns its variables.

    Every device normalises by the statistics of its own share of a batch; the running statistics are
    means over the devices.

    Args:
      model: called with ``train=True`` to train, or what its call names it.
      split: training images.
      settings: how to train.
      devices: to spread a batch over; by default all, those of other processes included.
      restore: given the state to start from, returns the one to go on from.
      after_epoch: called with the state and the epoch's mean loss.

    Raises:
      InputError: as :func:`check_batches` does.
      RunError: if the loss is no longer finite, or an image cannot be read.
    """
    devices = devices or jax.devices()
    share = check_batches(settings, split, devices)
    steps_per_epoch = len(split) // settings.batch_size
    total = settings.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, max(1, total // 10), max(2, total))
    optimizer = optax.chain(
        optax.add_decayed_weights(settings.weight_decay), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )

    mode: dict[str, Any] = {name: not value for name, value in evaluation_mode(model).items()}

    def train_step(variables, opt_state, images, labels):
        def loss_of(params):
            logits, updates = model.apply({**variables, "params": params}, images, **mode, mutable=["batch_stats"])
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), settings.label_smoothing)
            return jnp.mean(optax.softmax_cross_entropy(wide(logits), targets)), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        loss, updates, gradients = mean_over_devices((loss, updates, gradients), AXIS)
        changes, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        return {**variables, **updates, "params": optax.apply_updates(variables["params"], changes)}, opt_state, loss

    mapped = jax.pmap(
        train_step, AXIS, in_axes=(None, None, 0, 0), out_axes=None, donate_argnums=(0, 1), devices=devices
    )
    images = split.dataset.normalise(split.examples(np.array([0]))[0])
    variables = nn.meta.unbox(jax.jit(partial(model.init, **evaluation_mode(model)))(random_key(settings.seed), images))
    state = place(restore(_state(0, variables, optimizer.init(variables["params"]))), devices)
    done = int(state.epoch)
    shown: dict[str, str] = {}
    with Progress(total, label="teacher", done=done * steps_per_epoch) as progress:
        for epoch in range(done, settings.epochs):
            variables, opt_state, losses = state.variables, state.opt_state, []
            for batch in ahead(_shuffled_batches(split, settings, epoch, share.ravel())):
                parts = [array.reshape(*share.shape, *array.shape[1:]) for array in batch]
                parts = place(parts, devices, split=True)
                variables, opt_state, loss = mapped(variables, opt_state, *parts)
                settle(loss, devices)
                losses.append(loss)
                step = epoch * steps_per_epoch + len(losses)
                progress.update(step, epoch=f"{step // steps_per_epoch}/{settings.epochs}", **shown)
            state = _state(epoch + 1, variables, opt_state)
            mean_loss = float(np.mean(jax.device_get(losses)))
            if not math.isfinite(mean_loss):
                raise RunError(f"the teacher's loss is {mean_loss} in epoch {epoch}: its learning rate is too high")
            shown = {"loss": f"{mean_loss:.4f}"}
            after_epoch(state, mean_loss)
    return state.variables


def check_batches(
    settings: PretrainSettings, split: Split, devices: Sequence[jax.Device], owner: str = "PretrainSettings"
) -> np.ndarray:
    """Raises an ``InputError`` unless batches as in ``settings``, called ``owner``, can be made of ``split``.

    They must not be larger than it, divide over ``devices``, and have small images no larger than its own.

    Returns:
      The places of a batch that fall to this process, as :func:`granq_jax.runtime.devices.sample_index` does.
    """
    share = sample_index(settings.batch_size, devices, f"{owner}.batch_size")
    if settings.batch_size > len(split):
        raise InputError(
            f"{owner}.batch_size: got {settings.batch_size}, "
            f"allowed are whole numbers up to the {len(split)} training images"
        )
    if settings.small_epochs and settings.small_size > split.dataset.image_size:
        raise InputError(
            f"{owner}.small_size: got {settings.small_size}, "
            f"allowed are whole numbers up to the images' {split.dataset.image_size} pixels"
        )
    return share


def _state(epoch: int, variables: Variables, opt_state: optax.OptState) -> PretrainState:
    return PretrainState(jnp.asarray(epoch, jnp.int32), variables, opt_state)


def _shuffled_batches(split: Split, settings: PretrainSettings, epoch: int, share: np.ndarray) -> Iterator[Batch]:
    # A stream of its own for each epoch: training that goes on sees what it would have seen.
    rng = np.random.default_rng((settings.seed, epoch))
    small = epoch < settings.small_epochs
    size, max_shift = (settings.small_size, 0) if small else (split.dataset.image_size, settings.max_shift)
    order = rng.permutation(len(split))
    for start in range(0, len(split) - settings.batch_size + 1, settings.batch_size):
        images, labels = split.augmented(order[start : start + settings.batch_size], rng, size, max_shift, share)
        if settings.flip:
            mirrored = rng.random(settings.batch_size)[share] < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        yield split.dataset.normalise(images), labels
