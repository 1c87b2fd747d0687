"""ImageNet, ResNet-50, 5-bit weights and 5-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_resnet50_w5a5.py

Published top-1 at these bits: none in the tables at hand.
Measured here: not yet measured.
"""

from granq_jax.configs.paper import imagenet_resnet50_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for what is set here."""
    config = imagenet_resnet50_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 5
    config.decay_epochs = (350, 400)
    config.loss.lambda_lower = 0.3
    return config
