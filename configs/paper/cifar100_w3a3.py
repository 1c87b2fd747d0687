"""CIFAR-100, ResNet-20, 3-bit weights and 3-bit activations.

    python -m granq_jax.main --config configs/paper/cifar100_w3a3.py

Published top-1 at these bits, teacher 70.33 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 47.61, ARC 40.15, Qimera 46.13, ARC+AIT 41.34, IntraQ 48.25, AdaDFQ 52.74, HAST 55.67,
TexQ 55.87, PLF 57.03, SynQ 57.28.
Measured here, teacher 63.92: 56.35 after 2,000 of the 40,000 iterations, 42.36 before training (seed 0, commit 262afa2;
see docs/results.md). All of them: not yet measured.
"""

from ml_collections import ConfigDict

from granq_jax.config import default_config


def get_config() -> ConfigDict:
    """As for CIFAR-10, but for data, network and batch size."""
    config = default_config()
    config.network = "resnet20_cifar100"
    config.dataset = "cifar100"
    config.teacher = "resnet20_cifar100"
    config.batch_size = 200
    return config
