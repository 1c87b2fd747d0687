"""CIFAR-10, ResNet-20, 3-bit weights and 3-bit activations.

    python -m granq_jax.main --config configs/cifar10_w3a3.py --config.teacher=CHECKPOINT

The full 200 epochs: not yet measured. Measured for 24 epochs: see the README.
"""

from ml_collections import ConfigDict

from granq_jax.config import default_config


def get_config() -> ConfigDict:
    """The paper's settings for this network, which are the package's defaults."""
    return default_config()
