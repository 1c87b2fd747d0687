"""A config for runs that are small enough for tests."""

from ml_collections import ConfigDict

from granq_jax.config import default_config


def digits() -> ConfigDict:
    """Digits at W3A3 with the released losses and rates, which use all that a run has."""
    config = default_config()
    config.network = "resnet8_digits"
    config.dataset = "digits"
    config.teacher = "train"
    config.batch_size = 64
    config.epochs = 10
    config.steps_per_epoch = 100
    config.student.lr = 1e-3
    config.eval_batch_size = 120
    config.eval_every_epochs = 5
    config.teacher_training.epochs = 40
    config.teacher_training.batch_size = 64
    config.teacher_training.lr = 0.1
    config.teacher_training.max_shift = 1
    config.teacher_training.flip = False
    config.teacher_training.small_epochs = 0
    return config
