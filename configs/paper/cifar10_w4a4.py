"""CIFAR-10, ResNet-20, 4-bit weights and 4-bit activations.

    python -m granq_jax.main --config configs/paper/cifar10_w4a4.py

Published top-1 at these bits, teacher 93.89 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 90.11, ARC 88.55, Qimera 91.26, ARC+AIT 90.49, IntraQ 91.49, AdaDFQ 92.31, HAST 92.36,
TexQ 92.68, PLF 92.47, SynQ 92.76.
Measured here, teacher 91.61: 91.05 after 30 of the 200 epochs, 90.27 before training (seed 0, commit 7244eb7; see
docs/results.md). All 200: not yet measured.
"""

from granq_jax.configs.paper import cifar10_w3a3
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As at 3 bits, but for the bits."""
    config = cifar10_w3a3.get_config()
    config.quant.weight_bits = config.quant.act_bits = 4
    return config
