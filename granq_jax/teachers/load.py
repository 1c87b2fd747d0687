"""Where the full-precision teacher of a run comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from granq_jax.config import TRAIN_A_TEACHER, make_dataset, make_teacher_training
from granq_jax.data.datasets import load_split
from granq_jax.data.splits import Dataset, Split
from granq_jax.distill.trainer import Variables
from granq_jax.errors import InputError, InputFileError
from granq_jax.files.writing import write_json
from granq_jax.models.registry import create_model
from granq_jax.runs import names
from granq_jax.runs.checkpoint import Checkpoints, save_variables
from granq_jax.runtime.paths import expanded
from granq_jax.runtime.processes import from_first, is_first, together
from granq_jax.teachers import zoo
from granq_jax.teachers.torch_import import load_named, load_torch
from granq_jax.teachers.torch_names import OWN_NAMES
from granq_jax.teachers.training import PretrainState, check_batches, pretrain

BUNDLED = "bundled"
_BUNDLE = Path(__file__).parent / "bundled"

_LOGGER = logging.getLogger(__name__)


def check_teacher(config: ConfigDict) -> None:
    """Raises if ``config.teacher`` cannot be what it says, without reading or downloading it.

    Raises:
      InputError: if it is empty, ``"bundled"`` where no teacher comes with the package, or a public
        checkpoint of another network.
      FileNotFoundError: if there is no such file.
    """
    teacher, network = config.teacher, config.network
    allowed = [
        f"the path of a checkpoint of {network} (.npz, .safetensors or PyTorch's)",
        f"{TRAIN_A_TEACHER!r} to train one first",
        *(f"{BUNDLED!r}, which comes with the package" for name in _bundled_networks() if name == network),
        *(f"{name!r}, a public checkpoint" for name in zoo.CHECKPOINTS if name == network),
    ]
    if teacher == "":
        raise InputError(f"config.teacher: not set, allowed are {', '.join(allowed)}")
    other_network = teacher in zoo.CHECKPOINTS and teacher != network
    if other_network or (teacher == BUNDLED and network not in _bundled_networks()):
        raise InputError(f"config.teacher: got {teacher!r} for {network!r}, allowed are {', '.join(allowed)}")
    known = teacher in (TRAIN_A_TEACHER, BUNDLED, *zoo.CHECKPOINTS)
    if not known and not os.path.isfile(expanded(teacher, "config.teacher")):
        raise InputFileError(
            f"config.teacher: got {teacher!r}, but there is no such file; allowed are {', '.join(allowed)}"
        )


def load_teacher(config: ConfigDict, workdir: Path) -> Variables:
    """The teacher's variables, float32: read from a file, downloaded once, or trained.

    A trained teacher is kept in ``workdir/teacher.safetensors``, a file of the kind that
    ``config.teacher`` may name in other runs.

    Raises:
      InputError: as :func:`check_teacher`, :func:`granq_jax.teachers.zoo.fetch` and
        :func:`granq_jax.load_torch` do.
    """
    # Several processes must have the very same teacher, whatever their files hold.
    variables = from_first(lambda: _read_teacher(config, workdir))
    if variables is None:
        variables, _ = run_training(config, workdir)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)


def _read_teacher(config: ConfigDict, workdir: Path) -> Variables | None:
    """The teacher's variables; ``None`` if it is to be trained first."""
    check_teacher(config)
    if config.teacher == TRAIN_A_TEACHER:
        trained = workdir / names.TRAINED_TEACHER
        if not trained.exists():
            return None
        _check_same_settings(config, workdir)
        return load_torch(config.network, trained)
    if config.teacher == BUNDLED:
        return load_torch(config.network, _BUNDLE / f"{config.network}.safetensors")
    if config.teacher in zoo.CHECKPOINTS:
        return load_torch(config.network, zoo.fetch(config.teacher))
    variables, zoo_of_names = load_named(config.network, config.teacher)
    pixels = make_dataset(config)
    if zoo_of_names == OWN_NAMES:
        _check_same_pixels(pixels, expanded(config.teacher, "config.teacher").parent / names.TEACHER_RESULT)
    else:
        _LOGGER.info(
            "teacher: the file does not say how its images were normalised; taken are mean %s and std %s: set "
            "config.mean and config.std if it was trained with others",
            pixels.mean,
            pixels.std,
        )
    return variables


def check_loads(config: ConfigDict, workdir: Path, anew: bool) -> None:
    """Raises as :func:`load_teacher` would, as far as that is known before training; writes nothing.

    Args:
      config: of the run.
      workdir: of the run.
      anew: as if no teacher had been trained there.
    """
    if anew or _read_teacher(config, workdir) is None:
        _training_split(config)
        if not anew and (workdir / names.TEACHER_TRAINING / names.TEACHER_SETTINGS).exists():
            _check_same_settings(config, workdir)


def teacher_of_run(config: ConfigDict, workdir: Path) -> Variables:
    """The teacher of a run that has been; it is not trained for this.

    Raises:
      InputError: if it cannot be had.
    """
    check_teacher_of_run(config, workdir)
    return load_teacher(config, workdir)


def check_teacher_of_run(config: ConfigDict, workdir: Path) -> None:
    """Raises an ``InputError`` if the teacher is one that ``workdir`` should hold and does not."""
    if config.teacher == TRAIN_A_TEACHER and not (workdir / names.TRAINED_TEACHER).is_file():
        raise InputError(f"config.teacher: got {config.teacher!r}, but {str(workdir)!r} holds no trained teacher")


def _bundled_networks() -> list[str]:
    return sorted(path.stem for path in _BUNDLE.glob("*.safetensors"))


def run_training(config: ConfigDict, workdir: Path) -> tuple[Variables, float]:
    """Trains the teacher or goes on training it; writes ``workdir/teacher.safetensors``.

    Returns:
      Its variables, and the seconds it took, those before it was broken off included.

    Raises:
      InputError: if the data set cannot be had, or the directory holds a training with other settings.
      RunError: if a checkpoint cannot be written, or none of those there can be read.
    """
    directory = workdir / names.TEACHER_TRAINING
    with together():
        split, settings = _training_split(config), make_teacher_training(config)
        if is_first():
            if (directory / names.TEACHER_SETTINGS).exists():
                _check_same_settings(config, workdir)
            directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / names.TEACHER_SETTINGS, _described(config))
    log = directory / names.METRICS
    start = time.monotonic()
    with Checkpoints(directory) as checkpoints:

        def go_on(initial: PretrainState) -> PretrainState:
            nonlocal start
            saved = checkpoints.newest(initial)
            if is_first():
                # A line may have been written for an epoch whose checkpoint was not.
                lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
                lines = lines[: saved.step if saved else 0]
                log.touch()
                os.truncate(log, sum(map(len, lines)))
                start -= _fields(lines[-1], log).get("seconds", 0.0) if lines else 0.0
            return saved.state if saved else initial

        def after_epoch(state: PretrainState, loss: float) -> None:
            epoch = int(state.epoch)
            if is_first():
                with log.open("a") as file:
                    line = {"epoch": epoch, "loss": loss, "seconds": round(time.monotonic() - start, 1)}
                    file.write(json.dumps(line) + "\n")
            checkpoints.save(epoch, state)

        variables = pretrain(create_model(config.network), split, settings, restore=go_on, after_epoch=after_epoch)
    seconds = time.monotonic() - start
    save_variables(workdir / names.TRAINED_TEACHER, variables)
    return variables, seconds


def _training_split(config: ConfigDict) -> Split:
    split = load_split(config.dataset, "train", config.data_dir, config.mean, config.std)
    check_batches(make_teacher_training(config), split, jax.devices(), "config.teacher_training")
    return split


def _described(config: ConfigDict) -> dict[str, Any]:
    """What a teacher in training is known by."""
    # As they are in JSON, and only where they are not the usual ones.
    pixels = {what: list(config[what]) for what in ("mean", "std") if config[what]}
    settings = dataclasses.asdict(make_teacher_training(config))
    return {"network": config.network, "dataset": config.dataset, **pixels, **settings}


def _check_same_settings(config: ConfigDict, workdir: Path) -> None:
    """Raises an ``InputError`` unless the teacher in ``workdir`` is trained with the settings of ``config``."""
    path, settings = workdir / names.TEACHER_TRAINING / names.TEACHER_SETTINGS, _described(config)
    if not path.exists():
        raise InputError(
            f"workdir: {str(workdir)!r} holds {names.TRAINED_TEACHER}, but nothing says how it was trained; name it "
            "with config.teacher, or move it away"
        )
    begun = _fields(path.read_text(), path)
    for key in settings.keys() | begun.keys():
        if settings.get(key) != begun.get(key):
            raise InputError(
                f"workdir: {str(workdir)!r} holds a teacher trained with {key} {begun.get(key)!r} instead "
                f"of {settings.get(key)!r}; give the same settings to go on, or another workdir"
            )


def _check_same_pixels(pixels: Dataset, result: Path) -> None:
    """Raises an ``InputError`` if ``result``, of the training of a teacher, tells of images normalised otherwise."""
    trained: Any = None
    with contextlib.suppress(OSError, ValueError):  # there is none, or a damaged one
        trained = json.loads(result.read_text())
    for what in ("mean", "std"):
        given = list(getattr(pixels, what))
        before = trained.get(what, given) if isinstance(trained, dict) else given
        if before != given:
            raise InputError(
                f"config.{what}: got {given}, but {str(result)!r} says the teacher was trained with {before}"
            )


def _fields(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f"workdir: {str(path)!r} is damaged; move {str(path.parent)!r} away to train anew")
    return fields
