"""ImageNet, ResNet-18, 3-bit weights and 3-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_resnet18_w3a3.py

Published top-1 at these bits, teacher 71.47 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 20.23, ARC 23.37, Qimera 1.17, IntraQ 45.51, AdaDFQ 38.10, HAST 42.58, TexQ 50.28, SynQ
52.02.
Measured here: not yet measured.
"""

from granq_jax.configs.paper._imagenet import imagenet_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's settings for this network."""
    config = imagenet_config("resnet18")
    config.warmup_epochs = 50
    return config
