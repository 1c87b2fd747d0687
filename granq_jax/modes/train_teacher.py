"""``--mode train_teacher``: a full-precision teacher for users who have data but no checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from granq_jax.config import make_dataset
from granq_jax.data.splits import Split
from granq_jax.errors import InputError
from granq_jax.files.writing import write_json
from granq_jax.models.registry import create_model
from granq_jax.modes.opening import opened
from granq_jax.runs import names
from granq_jax.runs.accuracy import float_accuracy, percentages
from granq_jax.runs.record import check_writable, peak_rss_mb, versions
from granq_jax.runs.workdir import locked, teacher_is_of_run
from granq_jax.teachers.load import run_training


def train_teacher(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the config's network on its data set: ``--mode train_teacher``.

    In ``workdir`` it leaves ``teacher.safetensors``, which ``config.teacher`` may name in other runs,
    ``teacher.json``, and ``teacher_training/`` with a checkpoint and a line of ``metrics.jsonl`` an
    epoch. Called again after it was broken off, it goes on after the last epoch completed, and ends
    with the same teacher.

    Returns:
      What ``teacher.json`` holds. Accuracies are in percent, of the last weights; those of a config
      with ``eval="none"`` are ``None``.

    Raises:
      InputError: for a setting or data set that cannot be used, or a ``workdir`` that another process
        uses, or that holds a trained teacher, or one in training with other settings.
      RunError: if the training diverges, or a checkpoint cannot be written or read, or an image not read.
    """
    workdir, devices, split = opened("train_teacher", config, workdir, _check, evaluates=True)
    with locked(workdir):
        return _trained_and_evaluated(config, workdir, split, devices)


def _check(workdir: Path) -> None:
    # Trained here and without a result, it was broken off while it was evaluated.
    ended = os.path.exists(workdir / names.TEACHER_RESULT) or not os.path.isdir(workdir / names.TEACHER_TRAINING)
    if os.path.exists(workdir / names.TRAINED_TEACHER) and (ended or teacher_is_of_run(workdir)):
        raise InputError(f"workdir: {str(workdir)!r} already holds a teacher; give another one, or move it away")
    check_writable(workdir)


def _trained_and_evaluated(
    config: ConfigDict, workdir: Path, split: Split | None, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    variables, seconds = run_training(config, workdir)
    accuracy = None
    if split is not None:
        accuracy = float_accuracy(create_model(config.network), split, config.eval_batch_size, devices)(variables)
    result = {
        "dataset": config.dataset,
        "network": config.network,
        "teacher_training": config.teacher_training.to_dict(),
        "mean": list(make_dataset(config).mean),
        "std": list(make_dataset(config).std),
        "seed": config.seed,
        "eval_examples": 0 if split is None else len(split),
        **percentages("teacher", accuracy),
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
        "devices": [str(device) for device in devices],
        "processes": jax.process_count(),
        "versions": versions(),
    }
    write_json(workdir / names.TEACHER_RESULT, result)
    return result
