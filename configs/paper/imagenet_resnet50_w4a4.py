"""ImageNet, ResNet-50, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_resnet50_w4a4.py

Published top-1 at these bits, teacher 77.73 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 54.16, ARC 64.37, Qimera 66.25, ARC+AIT 68.27, AdaDFQ 68.38, TexQ 70.72, PLF 68.97,
SynQ 71.05.
Measured here: not yet measured.
"""

from granq_jax.configs.paper import imagenet_resnet50_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for what is set here."""
    config = imagenet_resnet50_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    config.decay_epochs = (200, 300, 400)
    config.loss.lambda_lower = 0.3
    config.loss.alpha_ds = 0.1
    return config
