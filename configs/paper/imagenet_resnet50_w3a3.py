"""ImageNet, ResNet-50, 3-bit weights and 3-bit activations.

    python -m granq_jax.main --config configs/paper/imagenet_resnet50_w3a3.py

Published top-1 at these bits, teacher 77.73 (SynQ, ICLR 2025, Table 1; other teachers and runs than
these): GDFQ 0.31, ARC 1.63, AdaDFQ 17.63, TexQ 25.27, SynQ 26.89.
Measured here: not yet measured.
"""

from granq_jax.configs.paper._imagenet import imagenet_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's settings for this network."""
    config = imagenet_config("resnet50")
    config.warmup_epochs = 50
    config.student.lr = 1e-4
    config.decay_epochs = (150, 300, 400)
    config.loss.lambda_lower = 0.4
    return config
