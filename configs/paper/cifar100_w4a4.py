"""CIFAR-100, ResNet-20, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/paper/cifar100_w4a4.py

Published top-1 at these bits, teacher 70.33 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 63.75, ARC 62.76, Qimera 65.10, ARC+AIT 61.05, IntraQ 64.98, AdaDFQ 66.81, HAST 66.68,
TexQ 67.18, PLF 66.94, SynQ 67.34.
Measured here: not yet measured.
"""

from granq_jax.configs.paper import cifar100_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for the bits."""
    config = cifar100_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    return config
