"""CIFAR-10, ResNet-20, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/cifar10_w4a4.py --config.teacher=CHECKPOINT

Accuracy: not yet measured.
"""

from granq_jax.configs import cifar10_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for the bits."""
    config = cifar10_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    return config
