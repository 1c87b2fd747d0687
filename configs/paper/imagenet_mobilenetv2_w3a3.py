"""ImageNet, MobileNetV2, 3-bit weights and 3-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_mobilenetv2_w3a3.py

Published top-1 at these bits, teacher 73.03 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 1.46, ARC 14.30, AdaDFQ 28.99, TexQ 32.80, SynQ 34.21.
Measured here: not yet measured.
"""

from granq_jax.configs.paper._imagenet import imagenet_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's settings for this network."""
    config = imagenet_config("mobilenetv2_w1")
    config.teacher_training.lr = 0.05
    config.teacher_training.weight_decay = 4e-5
    return config
