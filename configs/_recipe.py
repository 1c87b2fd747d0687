"""The recommended recipe: what the configs change of the released settings of a network (``configs/paper``)."""

from ml_collections import ConfigDict


def recommended(config: ConfigDict) -> ConfigDict:
    """``config``, the released settings of a network, with the recommended recipe.

    - Every convolution and dense layer reads activations of the given bits, the first one the image at 8 bits.
    - The generator is no adversary: it is after the label and the statistics of real data alone.
    - The student learns with Adam from batches of 64, and its rate falls to zero over the run.
    """
    config.epochs = 60
    config.batch_size = 64
    config.quant.placement = "operand"
    config.quant.overrides = (("^stem/conv$", (("act_bits", 8),)),)
    config.student.optimizer = "adam"
    config.student.lr = 1e-4
    config.student.schedule = "cosine"
    config.decay_epochs = ()
    config.loss.hinge = config.loss.alpha_ds = config.loss.alpha_as = 0.0
    config.loss.alpha_label = 1.0
    config.loss.gamma = 10.0
    return config
