"""ImageNet, MobileNetV2, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_mobilenetv2_w4a4.py

Published top-1 at these bits, teacher 73.03 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 59.43, ARC 60.13, Qimera 61.62, ARC+AIT 66.47, IntraQ 65.10, AdaDFQ 65.41, HAST 65.60,
TexQ 67.07, SynQ 67.27.
Measured here: not yet measured.
"""

from granq_jax.configs.paper import imagenet_mobilenetv2_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for what is set here."""
    config = imagenet_mobilenetv2_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    config.loss.alpha_ds = 0.3
    return config
