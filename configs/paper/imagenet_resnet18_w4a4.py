"""ImageNet, ResNet-18, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_resnet18_w4a4.py

Published top-1 at these bits, teacher 71.47 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 60.60, ARC 61.32, Qimera 63.84, ARC+AIT 65.73, IntraQ 66.47, AdaDFQ 66.53, HAST 66.91,
TexQ 67.73, PLF 67.02, SynQ 67.90.
Measured here: not yet measured.
"""

from granq_jax.configs.paper import imagenet_resnet18_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for what is set here."""
    config = imagenet_resnet18_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    config.loss.lambda_lower = 0.3
    return config
