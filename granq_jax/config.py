"""Settings of a run: defaults, loading, and the check that every value must pass first."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from granq_jax.data.datasets import DATASETS, described
from granq_jax.data.splits import Dataset
from granq_jax.distill.settings import LARGEST, LossSettings, OptimizerSettings, PretrainSettings
from granq_jax.distill.trainer import Trainer
from granq_jax.errors import Check, InputError, checks_of, choice, for_channels, real, setting, text, truth, whole
from granq_jax.models.generator import Generator
from granq_jax.models.registry import NETWORKS, create_model
from granq_jax.quant.spec import QuantSpec
from granq_jax.runtime.paths import expanded

TRAIN_A_TEACHER = "train"
SCHEDULES = ("steps", "cosine")
ON_BREAKDOWN = ("stop", "go_on")
PAPER = "paper"  # the folder of the released settings
_CONFIGS = resources.files("granq_jax.configs")
_MOST_STEPS = 2**31 - 1  # they are counted in 32 bits


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """What a run is of, how long it lasts, and what it writes.

    Attributes:
      network: the teacher's and the student's, see :mod:`granq_jax.models.registry`.
      dataset: what the teacher was trained on; used to evaluate, and to train a teacher.
      data_dir: where it is; ``""`` is TensorFlow Datasets' own default.
      mean: and
      std: of pixels from 0 to 1, a number for each channel, as the teacher was trained with; ``()`` is the usual one.
      teacher: ``"bundled"``, a checkpoint's path, a public checkpoint's name, or ``"train"`` to train one first.
      epochs: of the run, warm-up included.
      eval: ``"test"``, or ``"none"`` for a run without any data.
      eval_batch_size: images evaluated at a time, over all devices; small ones are faster on CPUs.
      eval_every_epochs: how often the student is evaluated.
      checkpoint_every_epochs: how often the run is saved.
      keep_checkpoints: so many of the newest checkpoints are kept,
      keep_best: and that of the best evaluation.
      resume: whether a run that is there goes on; False refuses it.
      on_breakdown: ``"stop"`` or ``"go_on"``: what a run does when its student breaks down on held-out images.
      log_every_steps: steps from one line of metrics to the next.
      student_schedule: ``"steps"``, a tenth of the rate from each of ``decay_epochs`` on, or ``"cosine"``, by which
        the student's rate also falls to zero over the run.
      generator_conditional: whether labels choose scale and shift of the generator's batch norms.
      profile_start: the first step of the trace of a run, and
      profile_steps: how many steps it holds; 0 is no trace.
    """

    network: str = setting("resnet20_cifar10", choice(*NETWORKS))
    dataset: str = setting("cifar10", choice(*DATASETS))
    data_dir: str = setting("", text())
    mean: tuple[float, ...] = setting((), for_channels(real(0, 1)))
    std: tuple[float, ...] = setting((), for_channels(real(0, low_open=True)))
    teacher: str = setting("bundled", text())
    epochs: int = setting(200, whole(1))
    eval: str = setting("test", choice("test", "none"))
    eval_batch_size: int = setting(64, whole(1, LARGEST))
    eval_every_epochs: int = setting(10, whole(1))
    checkpoint_every_epochs: int = setting(10, whole(1))
    keep_checkpoints: int = setting(2, whole(1))
    keep_best: bool = setting(True, truth())
    resume: bool = setting(True, truth())
    on_breakdown: str = setting("stop", choice(*ON_BREAKDOWN))
    log_every_steps: int = setting(20, whole(1))
    student_schedule: str = setting("steps", choice(*SCHEDULES))
    generator_conditional: bool = setting(False, truth())
    profile_start: int = setting(10, whole(0))
    profile_steps: int = setting(0, whole(0))


# Whose fields a config's settings are, and the group that they stand in; the fields that begin with the name of a group
# stand in that one, without its name.
_OWNERS = {
    **{RunSettings: "", Trainer: "", OptimizerSettings: "", QuantSpec: "quant", LossSettings: "loss"},
    PretrainSettings: "teacher_training",
}
_GROUPS = ("student", "generator", "profile")
# The config says otherwise: the cosine ends with the run, and most teachers begin with small images.
_NOT_SET, _DEFAULTS = {"cosine_epochs"}, {"teacher_training.small_epochs": 38}


def _keys(owner: type) -> dict[str, str]:
    """Of each setting of a class its name in a config: ``{"student_lr": "student.lr"}``."""
    keys = {}
    for field in checks_of(owner):
        group, _, rest = field.partition("_")
        if owner is Trainer and field == "impl":
            keys[field] = "quant.impl"
        elif group in _GROUPS:
            keys[field] = f"{group}.{rest}"
        elif field not in _NOT_SET:
            keys[field] = f"{_OWNERS[owner]}.{field}".removeprefix(".")
    return keys


CHECKS: dict[str, Check] = {key: checks_of(owner)[field] for owner in _OWNERS for field, key in _keys(owner).items()}


def default_config() -> ConfigDict:
    """All settings there are, with the paper's values for CIFAR-10 and ResNet-20.

    A config file takes these and sets what differs. What they mean stands with the classes whose fields they are:
    :class:`RunSettings`, :class:`~granq_jax.QuantSpec`, :class:`~granq_jax.OptimizerSettings`,
    :class:`~granq_jax.LossSettings`, :class:`~granq_jax.Trainer` and
    :class:`~granq_jax.distill.settings.PretrainSettings`.

    Examples:
      >>> default_config().quant.weight_bits
      3
    """
    values: dict[str, Any] = {}
    for owner in _OWNERS:
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        for field, key in _keys(owner).items():
            group, _, name = key.rpartition(".")
            section = values.setdefault(group, {}) if group else values
            section[name] = _DEFAULTS.get(key, defaults[field])
    return ConfigDict(values)


def settings_of(owner: type, config: ConfigDict) -> dict[str, Any]:
    """What a config says of the fields of a class.

    Examples:
      >>> settings_of(QuantSpec, default_config())["weight_granularity"]
      'out_channel'
    """
    values = dict(flat(config))
    return {field: values[key] for field, key in _keys(owner).items()}


def make_dataset(config: ConfigDict) -> Dataset:
    """What a config says of its images: the data set's, or with the mean and deviation of its teacher's training."""
    return described(config.dataset, config.mean, config.std)


def make_trainer(config: ConfigDict) -> Trainer:
    """The :class:`~granq_jax.Trainer` that a config describes."""
    dataset = DATASETS[config.dataset]
    return Trainer(
        model=create_model(config.network),
        generator=Generator(dataset.classes, dataset.image_size, dataset.channels, config.generator.conditional),
        spec=QuantSpec(**settings_of(QuantSpec, config)),
        losses=LossSettings(**settings_of(LossSettings, config)),
        optimizers=OptimizerSettings(
            **settings_of(OptimizerSettings, config),
            cosine_epochs=config.epochs if config.student.schedule == "cosine" else 0,
        ),
        **settings_of(Trainer, config),
    )


def make_teacher_training(config: ConfigDict) -> PretrainSettings:
    """How a config says that a teacher is trained."""
    return PretrainSettings(**settings_of(PretrainSettings, config), seed=config.seed)


def load_config(name: str | os.PathLike) -> ConfigDict:
    """The config ``name``: what ``--config`` does.

    Args:
      name: the path of a Python file with a ``get_config()``, that of a run's ``config.json``, or
        the bare name of a config that comes with the package.

    Raises:
      InputError: if there is none of that name; it lists those there are.

    Examples:
      >>> config = load_config("cifar10_w4a4")
      >>> config.quant.weight_bits, config.network
      (4, 'resnet20_cifar10')
    """
    path = expanded(name, "config")
    if str(name) in config_names():
        path = Path(str(_CONFIGS / f"{name}.py"))
    if path.suffix not in (".py", ".json") or not os.path.isfile(path):  # which, unlike Path's, takes any name
        names = ", ".join(config_names())
        raise InputError(f"config: got {str(name)!r}, allowed are paths of .py or .json files that exist, and {names}")
    if path.suffix == ".json":
        return _from_json(path)
    module_spec = importlib.util.spec_from_file_location(f"granq_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"config: {str(path)!r} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config()
        if isinstance(config, ConfigDict):
            config.lock()
    except (Exception, SystemExit) as error:  # it is the user's code, which may fail in any way
        raise InputError(f"config: {str(path)!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config: get_config() of {str(path)!r} gives {type(config).__name__}, allowed is ConfigDict")
    return config


def _from_json(path: Path) -> ConfigDict:
    config = default_config()
    try:
        values = dict(flat(json.loads(path.read_text())))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"config: {str(path)!r} is not a run's config.json: {error}") from None
    for key, value in values.items():
        check_setting_exists(key)
        with config.ignore_type():  # the check before a run names what is wrong
            config.update_from_flattened_dict({key: _tuples(value)})
    config.lock()
    return config


def run_name(source: str | os.PathLike) -> str:
    """What runs of the config at a path, or of a name, are called.

    Examples:
      >>> run_name("configs/digits_w2a2.py"), run_name("configs/paper/cifar10_w3a3.py")
      ('digits_w2a2', 'paper/cifar10_w3a3')
    """
    path = Path(source)
    return f"{PAPER}/{path.stem}" if path.parent.name == PAPER else path.stem


def _tuples(value: Any) -> Any:
    """``value`` with tuples for lists, which JSON makes of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def config_names() -> list[str]:
    """The names of the configs that come with the package; those of the released settings begin with ``paper/``."""
    folders = (("", _CONFIGS), (f"{PAPER}/", _CONFIGS / PAPER))
    files = (f"{folder}{entry.name}" for folder, entries in folders for entry in entries.iterdir())
    return sorted(file[:-3] for file in files if file.endswith(".py") and Path(file).name[0] != "_")


def check_setting_exists(key: str) -> None:
    """Raises an ``InputError`` that lists all settings if ``key`` (``quant.act_bits``) is not one."""
    if key not in CHECKS:
        raise InputError(f"config.{key}: there is no such setting; allowed are {', '.join(CHECKS)}")


def check_config(config: ConfigDict) -> None:
    """Raises an ``InputError`` that names the first setting that is not allowed.

    Examples:
      >>> config = default_config()
      >>> config.quant.weight_bits = 9
      >>> check_config(config)
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: config.quant.weight_bits: got 9, allowed are whole numbers from 2 to 8
    """
    try:
        values = dict(flat(config))
    except RequiredValueError as error:
        raise InputError(f"config: {error}") from None
    for key in values:
        check_setting_exists(key)
    for key, (holds, allowed) in CHECKS.items():
        if key not in values:
            raise InputError(f"config.{key}: not set, allowed are {allowed}")
        if not holds(values[key]):
            raise InputError(f"config.{key}: got {values[key]!r}, allowed are {allowed}")
    if config.warmup_epochs > config.epochs:
        raise InputError(
            f"config.warmup_epochs: got {config.warmup_epochs}, "
            f"allowed are whole numbers up to config.epochs, {config.epochs}"
        )
    if config.student.schedule == "cosine" and config.warmup_epochs >= config.epochs:
        raise InputError(
            f"config.student.schedule: got 'cosine' with config.warmup_epochs {config.warmup_epochs} of config.epochs "
            f"{config.epochs}, which leave the student no step; allowed is 'steps'"
        )
    steps = config.epochs * config.steps_per_epoch
    if steps > _MOST_STEPS:
        raise InputError(
            f"config.epochs: got {config.epochs} of {config.steps_per_epoch} steps, "
            f"allowed are up to {_MOST_STEPS} steps in all"
        )
    if config.profile.steps and config.profile.start + config.profile.steps > steps:
        raise InputError(
            f"config.profile.start: got {config.profile.start} with config.profile.steps {config.profile.steps}, "
            f"allowed are traces that end within the run's {steps} steps"
        )
    network, dataset = NETWORKS[config.network], DATASETS[config.dataset]
    for what in ("classes", "image_size", "channels"):
        if getattr(network, what) != getattr(dataset, what):
            raise InputError(
                f"config.dataset: got {config.dataset!r} with {what} {getattr(dataset, what)}, but config.network, "
                f"{config.network!r}, allows {what} {getattr(network, what)} only"
            )
    for what in ("mean", "std"):
        if len(config[what]) not in (0, dataset.channels):
            raise InputError(
                f"config.{what}: got {config[what]}, allowed are {dataset.channels} numbers, one for each channel of "
                f"{config.dataset}, and ()"
            )
    training = config.teacher_training
    if training.small_epochs and training.small_size > dataset.image_size:
        raise InputError(
            f"config.teacher_training.small_size: got {training.small_size}, "
            f"allowed are whole numbers up to the {dataset.image_size} pixels of {config.dataset}"
        )
    try:
        make_trainer(config)
        make_teacher_training(config)
    except InputError as error:
        raise InputError(_in_words_of_configs(str(error))) from None


def _in_words_of_configs(message: str) -> str:
    """A message about fields of classes, with the names that a config has for them."""
    for owner in _OWNERS:
        for field, key in sorted(_keys(owner).items(), key=lambda item: -len(item[0])):
            message = message.replace(f"{owner.__name__}.{field}", f"config.{key}")
    return message


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of ``tree``, a config or a part of one, as (``quant.act_bits``, value)."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
