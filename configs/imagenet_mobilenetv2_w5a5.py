"""ImageNet, MobileNetV2, 5-bit weights and 5-bit activations: the recommended recipe.

    python -m granq_jax.main --config configs/imagenet_mobilenetv2_w5a5.py

Measured here: not yet measured.
"""

from granq_jax.configs._recipe import recommended
from granq_jax.configs.paper import imagenet_mobilenetv2_w5a5
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The released settings of this network, with the recommended recipe."""
    return recommended(imagenet_mobilenetv2_w5a5.get_config())
