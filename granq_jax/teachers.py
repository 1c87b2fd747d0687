"""Where the full-precision teacher of a run comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from granq_jax.checkpoint import save_variables
from granq_jax.config import TRAIN_A_TEACHER
from granq_jax.data import load_split
from granq_jax.models.registry import create_model
from granq_jax.pretrain import PretrainSettings, pretrain
from granq_jax.torch_import import load_torch

TRAINED_TEACHER = "teacher.safetensors"


def check_teacher(config: ConfigDict) -> None:
    """Raises if ``config.teacher`` is neither a file that exists nor ``"train"``.

    Raises:
      ValueError: if it is empty.
      FileNotFoundError: if there is no such file.
    """
    if config.teacher == "":
        raise ValueError(
            "config.teacher: not set, allowed are the path of a .npz, .safetensors, .pth or .pt checkpoint "
            f"of {config.network}, and {TRAIN_A_TEACHER!r} to train one first"
        )
    if config.teacher != TRAIN_A_TEACHER and not Path(config.teacher).is_file():
        raise FileNotFoundError(f"config.teacher: got {config.teacher!r}, but there is no such file")


def load_teacher(config: ConfigDict, workdir: Path) -> Mapping[str, Any]:
    """The teacher's variables, float32: read from ``config.teacher``, or trained.

    A trained teacher is kept in ``workdir/teacher.safetensors``, a file of the kind that
    ``config.teacher`` may name in other runs.

    Raises:
      ValueError, FileNotFoundError, ImportError: as :func:`check_teacher` and
        :func:`granq_jax.load_torch` do.
    """
    check_teacher(config)
    if config.teacher == TRAIN_A_TEACHER:
        settings = PretrainSettings(**config.teacher_training.to_dict(), seed=config.seed)
        split = load_split(config.dataset, "train", config.data_dir)
        variables = pretrain(create_model(config.network), split, settings)
        workdir.mkdir(parents=True, exist_ok=True)
        save_variables(workdir / TRAINED_TEACHER, variables)
    else:
        variables = load_torch(config.network, config.teacher)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
