"""Settings of a run: defaults, loading, and the check that every value must pass first."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from granq_jax.data.datasets import DATASETS
from granq_jax.distill.trainer import OBJECTIVES, ON_NONFINITE, STUDENT_OPTIMIZERS
from granq_jax.errors import Check, InputError
from granq_jax.errors import betas as _betas
from granq_jax.errors import choice as _choice
from granq_jax.errors import decay as _decay
from granq_jax.errors import for_channels as _for_channels
from granq_jax.errors import increasing_epochs as _increasing_epochs
from granq_jax.errors import real as _real
from granq_jax.errors import text as _text
from granq_jax.errors import truth as _truth
from granq_jax.errors import whole as _whole
from granq_jax.models.registry import NETWORKS
from granq_jax.quant.dispatch import IMPLEMENTATIONS
from granq_jax.quant.spec import (
    ACT_GRANULARITIES,
    ACT_RANGES,
    KEPT_GRANULARITIES,
    MAX_BITS,
    MIN_BITS,
    PLACEMENTS,
    WEIGHT_GRANULARITIES,
    WEIGHT_RANGES,
    QuantSpec,
)
from granq_jax.runtime.paths import expanded
from granq_jax.runtime.platforms import PRECISIONS

TRAIN_A_TEACHER = "train"
SCHEDULES = ("steps", "cosine")
ON_BREAKDOWN = ("stop", "go_on")
PAPER = "paper"  # the folder of the released settings
_CONFIGS = resources.files("granq_jax.configs")


def default_config() -> ConfigDict:
    """All settings there are, with the paper's values for CIFAR-10 and ResNet-20.

    A config file takes these and sets what differs.

    Examples:
      >>> default_config().quant.weight_bits
      3
    """
    config = ConfigDict()
    config.seed = 0
    config.network = "resnet20_cifar10"
    config.dataset = "cifar10"
    config.data_dir = ""  # where the data are; "" is TFDS's own default
    config.mean = ()  # and
    config.std = ()  # of pixels from 0 to 1, a number for each channel, as the teacher was trained with; () is usual
    config.teacher = "bundled"  # or a checkpoint's path, a public checkpoint's name, "train" to train one first
    config.batch_size = 16  # over all devices
    config.epochs = 200
    config.steps_per_epoch = 200
    config.warmup_epochs = 4  # the first epochs, in which only the generator moves
    config.latent = 100
    config.eval = "test"  # or "none"
    config.eval_batch_size = 64  # faster on CPUs than larger ones
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.keep_checkpoints = 2  # the newest so many, and
    config.keep_best = True  # that of the best evaluation
    config.resume = True  # go on with a run that is there already; False refuses it
    config.on_nonfinite = "stop"  # or "skip": leave a step out whose losses or parameters are not finite
    config.on_breakdown = "stop"  # or "go_on": what a run does when its student breaks down on held-out images
    config.log_every_steps = 20
    config.precision = "default"  # of products on GPUs: "float32" or "tf32", or as jax_default_matmul_precision says

    config.quant = ConfigDict()
    config.quant.weight_bits = 3
    config.quant.act_bits = 3
    config.quant.weight_granularity = "out_channel"
    config.quant.weight_ranges = "minmax"  # or "mse": of least squared error
    config.quant.act_granularity = "sample_channel"
    config.quant.act_ranges = "dynamic"  # or "moving_average"
    config.quant.placement = "activation"
    config.quant.overrides = ()  # such as (("^stem/conv$", (("act_bits", 8),)),)
    config.quant.impl = "auto"

    config.student = ConfigDict()
    config.student.optimizer = "sgd"  # or "adam"
    config.student.lr = 1e-4
    config.student.schedule = "steps"  # or "cosine": the rate falls to zero over the run
    config.student.momentum = 0.9
    config.student.weight_decay = 1e-4
    config.student.ema_decay = 0.0  # of a moving average of its parameters, which is then the result; 0 is none

    config.generator = ConfigDict()  # Adam
    config.generator.lr = 1e-3
    config.generator.betas = (0.5, 0.999)
    config.generator.conditional = False  # labels choose scale and shift of its batch norms

    config.decay_epochs = (100, 200, 300)  # both rates fall to a tenth at each, epochs from 0

    config.loss = ConfigDict()
    config.loss.hinge = 1.0
    config.loss.alpha_ds = 0.2
    config.loss.alpha_as = 0.1
    config.loss.alpha_label = 0.0
    config.loss.beta = 1.0
    config.loss.gamma = 1.0
    config.loss.lambda_lower = 0.1
    config.loss.lambda_upper = 0.8
    config.loss.temperature = 20.0
    config.loss.objective = "adadfq"  # or "gdfq"
    config.loss.attention = 0.0  # of AKT's attention distillation

    config.profile = ConfigDict()  # a trace of `steps` steps from `start` on; 0 steps is none
    config.profile.start = 10
    config.profile.steps = 0

    config.teacher_training = ConfigDict()  # used by --mode train_teacher, and where teacher = "train"
    config.teacher_training.epochs = 50
    config.teacher_training.batch_size = 128
    config.teacher_training.lr = 0.2
    config.teacher_training.weight_decay = 5e-4
    config.teacher_training.label_smoothing = 0.0
    config.teacher_training.max_shift = 4  # pixels; photographs are cropped at random instead
    config.teacher_training.flip = True
    config.teacher_training.small_size = 24  # of the images in the first `small_epochs` epochs
    config.teacher_training.small_epochs = 38
    return config


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
      >>> run_name("configs/digits_w3a3.py"), run_name("configs/paper/cifar10_w3a3.py")
      ('digits_w3a3', 'paper/cifar10_w3a3')
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


def _are_overrides(value: Any) -> bool:
    try:
        QuantSpec(overrides=value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, tuple)


_LARGEST = 2**16  # of what arrays are made by: a slip of the hand shall not fill the memory
_MOST_STEPS = 2**31 - 1  # they are counted in 32 bits
CHECKS: dict[str, Check] = {
    "seed": _whole(0, 2**31 - 1),
    "network": _choice(*NETWORKS),
    "dataset": _choice(*DATASETS),
    "data_dir": _text(),
    "mean": _for_channels(_real(0, 1)),
    "std": _for_channels(_real(0, low_open=True)),
    "teacher": _text(),
    "batch_size": _whole(2, _LARGEST),
    "epochs": _whole(1),
    "steps_per_epoch": _whole(1),
    "warmup_epochs": _whole(0),
    "latent": _whole(1, _LARGEST),
    "eval": _choice("test", "none"),
    "eval_batch_size": _whole(1, _LARGEST),
    "eval_every_epochs": _whole(1),
    "checkpoint_every_epochs": _whole(1),
    "keep_checkpoints": _whole(1),
    "keep_best": _truth(),
    "resume": _truth(),
    "on_nonfinite": _choice(*ON_NONFINITE),
    "on_breakdown": _choice(*ON_BREAKDOWN),
    "log_every_steps": _whole(1),
    "precision": _choice(*PRECISIONS),
    "quant.weight_bits": _whole(MIN_BITS, MAX_BITS),
    "quant.act_bits": _whole(MIN_BITS, MAX_BITS),
    "quant.weight_granularity": _choice(*WEIGHT_GRANULARITIES),
    "quant.weight_ranges": _choice(*WEIGHT_RANGES),
    "quant.act_granularity": _choice(*ACT_GRANULARITIES),
    "quant.act_ranges": _choice(*ACT_RANGES),
    "quant.placement": _choice(*PLACEMENTS),
    "quant.overrides": (_are_overrides, "tuples of pairs of a pattern and its (field, value) pairs"),
    "quant.impl": _choice(*IMPLEMENTATIONS),
    "student.optimizer": _choice(*STUDENT_OPTIMIZERS),
    "student.lr": _real(0),
    "student.schedule": _choice(*SCHEDULES),
    "student.momentum": _decay(),
    "student.weight_decay": _real(0),
    "student.ema_decay": _decay(),
    "generator.lr": _real(0),
    "generator.betas": _betas(),
    "generator.conditional": _truth(),
    "decay_epochs": _increasing_epochs(),
    "loss.hinge": _real(0),
    "loss.alpha_ds": _real(0),
    "loss.alpha_as": _real(0),
    "loss.alpha_label": _real(0),
    "loss.beta": _real(0),
    "loss.gamma": _real(0),
    "loss.lambda_lower": _real(0, 1),
    "loss.lambda_upper": _real(0, 1),
    "loss.temperature": _real(0, low_open=True),
    "loss.objective": _choice(*OBJECTIVES),
    "loss.attention": _real(0),
    "profile.start": _whole(0),
    "profile.steps": _whole(0),
    "teacher_training.epochs": _whole(1),
    "teacher_training.batch_size": _whole(2, _LARGEST),
    "teacher_training.lr": _real(0, low_open=True),
    "teacher_training.weight_decay": _real(0),
    "teacher_training.label_smoothing": _real(0, 1),
    "teacher_training.max_shift": _whole(0, 224),
    "teacher_training.flip": _truth(),
    "teacher_training.small_size": _whole(1),
    "teacher_training.small_epochs": _whole(0),
}


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
    if config.loss.lambda_lower > config.loss.lambda_upper:
        raise InputError(
            f"config.loss.lambda_lower: got {config.loss.lambda_lower}, "
            f"allowed are numbers up to config.loss.lambda_upper, {config.loss.lambda_upper}"
        )
    if config.quant.act_ranges == "moving_average":
        if config.quant.act_granularity not in KEPT_GRANULARITIES:
            raise InputError(
                f"config.quant.act_granularity: got {config.quant.act_granularity!r} with config.quant.act_ranges "
                f"'moving_average', allowed are {', '.join(map(repr, KEPT_GRANULARITIES))}"
            )
        if not config.warmup_epochs:
            raise InputError(
                "config.warmup_epochs: got 0 with config.quant.act_ranges 'moving_average', whose ranges are measured "
                "in the warm-up; allowed are whole numbers from 1"
            )
    if config.student.schedule == "cosine" and config.warmup_epochs >= config.epochs:
        raise InputError(
            f"config.student.schedule: got 'cosine' with config.warmup_epochs {config.warmup_epochs} of config.epochs "
            f"{config.epochs}, which leave the student no step; allowed is 'steps'"
        )
    if config.warmup_epochs > config.epochs:
        raise InputError(
            f"config.warmup_epochs: got {config.warmup_epochs}, "
            f"allowed are whole numbers up to config.epochs, {config.epochs}"
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
    training = config.teacher_training
    if training.small_epochs > training.epochs:
        raise InputError(
            f"config.teacher_training.small_epochs: got {training.small_epochs}, "
            f"allowed are whole numbers up to config.teacher_training.epochs, {training.epochs}"
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
    if training.small_epochs and training.small_size > dataset.image_size:
        raise InputError(
            f"config.teacher_training.small_size: got {training.small_size}, "
            f"allowed are whole numbers up to the {dataset.image_size} pixels of {config.dataset}"
        )


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of ``tree``, a config or a part of one, as (``quant.act_bits``, value)."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
