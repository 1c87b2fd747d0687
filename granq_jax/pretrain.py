"""Supervised training of a full-precision teacher, for users who have no checkpoint but have data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from granq_jax.data import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """SGD with Nesterov momentum 0.9 and a cosine schedule down to zero.

    Attributes:
      epochs: passes over the training images.
      batch_size: images a step; a last, smaller batch of an epoch is left out.
      lr: greatest learning rate, reached after a tenth of the steps.
      weight_decay: L2 term on every parameter.
      max_shift: images are moved by up to so many pixels each way, edges filled with zeros.
      flip: whether half of the images are mirrored.
      seed: of initialisation, order and augmentation.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    max_shift: int
    flip: bool
    seed: int


def pretrain(model: nn.Module, split: Split, settings: PretrainSettings) -> Mapping[str, Any]:
    """Trains ``model`` from scratch on ``split`` and returns its variables.

    Raises:
      ValueError: if the split holds fewer images than a batch.
    """
    steps_per_epoch = len(split) // settings.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"config.teacher_training.batch_size: got {settings.batch_size}, "
            f"allowed are whole numbers up to the {len(split)} training images"
        )
    total = settings.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, max(1, total // 10), max(2, total))
    optimizer = optax.chain(
        optax.add_decayed_weights(settings.weight_decay), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )
    variables = jax.jit(model.init)(jax.random.key(settings.seed), split.dataset.normalise(split.images[:1]))
    opt_state = optimizer.init(variables["params"])

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(variables, opt_state, images, labels):
        def loss_of(params):
            logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        return {**updates, "params": optax.apply_updates(variables["params"], changes)}, opt_state, loss

    with tqdm(total=total, unit="step", desc="teacher", dynamic_ncols=True) as bar:
        for epoch in range(settings.epochs):
            for images, labels in _shuffled_batches(split, settings, np.random.default_rng((settings.seed, epoch))):
                variables, opt_state, loss = train_step(variables, opt_state, images, labels)
                bar.update()
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return variables


def _shuffled_batches(
    split: Split, settings: PretrainSettings, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    shift, size = settings.max_shift, split.dataset.image_size
    order = rng.permutation(len(split))
    for start in range(0, len(split) - settings.batch_size + 1, settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        padded = np.pad(split.images[chosen], ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        rows, columns = rng.integers(0, 2 * shift + 1, (2, len(chosen)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        images = windows[np.arange(len(chosen)), rows, columns].transpose(0, 2, 3, 1)
        if settings.flip:
            mirrored = rng.random(len(chosen)) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        yield split.dataset.normalise(images), split.labels[chosen]
