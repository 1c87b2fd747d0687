"""The student of a run that has been, or still is."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from granq_jax.distill import guard
from granq_jax.distill.trainer import Trainer, TrainState
from granq_jax.errors import InputError
from granq_jax.models.registry import variants
from granq_jax.runs import names
from granq_jax.runs.checkpoint import Checkpoints


def state_of_run(trainer: Trainer, workdir: Path) -> tuple[int, TrainState]:
    """The step and the state of the student that a run gives, or would give now: see :mod:`granq_jax.distill.guard`.

    Raises:
      InputError: if ``workdir`` holds none.
    """
    size, channels = trainer.generator.image_size, trainer.generator.channels
    images = jnp.zeros((1, size, size, channels), trainer.dtype)
    shapes = (jax.eval_shape(build.init, jax.random.key(0), images) for build in variants(trainer.model))
    if not os.path.isdir(workdir / names.CHECKPOINTS):
        raise InputError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
    likes = [trainer.state_shapes(variables) for variables in shapes]
    with Checkpoints(workdir, read_only=True) as checkpoints:
        saved = checkpoints.newest(*likes)
        if saved is None:
            raise InputError(f"workdir: {str(workdir)!r} holds no checkpoint of a run")
        chosen = guard.chosen(guard.scores_of(saved.notes))
        if chosen is not None and chosen != saved.step:
            saved = checkpoints.of_step(chosen, *likes)
    return saved.step, saved.state
