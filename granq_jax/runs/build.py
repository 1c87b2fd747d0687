"""The objects that a config describes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from granq_jax.data.datasets import DATASETS, described
from granq_jax.data.splits import Dataset
from granq_jax.distill.trainer import LossSettings, OptimizerSettings, Trainer
from granq_jax.errors import InputError
from granq_jax.models import Generator, create_model
from granq_jax.quant import QuantSpec
from granq_jax.runtime.devices import sample_index


def check_devices(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
    """Raises an ``InputError`` if the batches or the kernels of a config do not fit ``devices``."""
    sample_index(config.batch_size, devices, "config.batch_size")
    if config.eval != "none":
        sample_index(config.eval_batch_size, devices, "config.eval_batch_size")
    if config.quant.impl == "pallas" and devices[0].platform != "gpu":
        raise InputError(
            f"config.quant.impl: got 'pallas' on {devices[0].platform}, where only 'auto', 'xla' and "
            "'pallas_interpret' are allowed"
        )


def make_dataset(config: ConfigDict) -> Dataset:
    """What a config says of its images: the data set's, or with the mean and deviation of its teacher's training."""
    return described(config.dataset, config.mean, config.std)


def make_trainer(config: ConfigDict) -> Trainer:
    """The :class:`~granq_jax.distill.trainer.Trainer` that a config describes."""
    dataset = DATASETS[config.dataset]
    return Trainer(
        model=create_model(config.network),
        generator=Generator(dataset.classes, dataset.image_size, dataset.channels, config.generator.conditional),
        spec=make_spec(config),
        impl=config.quant.impl,
        losses=LossSettings(**config.loss.to_dict()),
        optimizers=OptimizerSettings(
            student_optimizer=config.student.optimizer,
            student_lr=config.student.lr,
            student_momentum=config.student.momentum,
            student_weight_decay=config.student.weight_decay,
            student_ema_decay=config.student.ema_decay,
            generator_lr=config.generator.lr,
            generator_betas=config.generator.betas,
            decay_epochs=config.decay_epochs,
            cosine_epochs=config.epochs if config.student.schedule == "cosine" else 0,
            steps_per_epoch=config.steps_per_epoch,
            warmup_epochs=config.warmup_epochs,
        ),
        batch_size=config.batch_size,
        latent=config.latent,
        seed=config.seed,
        on_nonfinite=config.on_nonfinite,
        precision=config.precision,
    )


def make_spec(config: ConfigDict) -> QuantSpec:
    """The :class:`~granq_jax.QuantSpec` that a config describes."""
    return QuantSpec(**{key: value for key, value in config.quant.items() if key != "impl"})
