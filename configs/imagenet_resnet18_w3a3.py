"""ImageNet, ResNet-18, 3-bit weights and 3-bit activations: the recommended recipe.

    python -m granq_jax.main --config configs/imagenet_resnet18_w3a3.py

Measured here: not yet measured.
"""

from granq_jax.configs._recipe import recommended
from granq_jax.configs.paper import imagenet_resnet18_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The released settings of this network, with the recommended recipe."""
    return recommended(imagenet_resnet18_w3a3.get_config())
