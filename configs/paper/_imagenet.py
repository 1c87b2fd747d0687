"""What the ImageNet configs have in common."""

from ml_collections import ConfigDict

from granq_jax.config import default_config


def imagenet_config(network: str) -> ConfigDict:
    """The paper's settings for ImageNet with the public checkpoint of ``network`` as teacher."""
    config = default_config()
    config.network = network
    config.dataset = "imagenet2012"
    config.teacher = network
    config.epochs = 400
    config.eval_batch_size = 48  # a multiple of the devices of most machines
    config.eval_every_epochs = 50
    config.student.lr = 1e-5
    config.generator.conditional = True
    config.decay_epochs = (350, 400)
    config.loss.temperature = 5.0
    # Training a teacher (He et al., CVPR 2016, section 3.4, but for the cosine schedule).
    config.teacher_training.epochs = 90
    config.teacher_training.batch_size = 256
    config.teacher_training.lr = 0.1
    config.teacher_training.weight_decay = 1e-4
    config.teacher_training.small_epochs = 0
    return config
