"""What can be set about training: optimizers, losses, and the training of a teacher."""

from __future__ import annotations

import dataclasses

from granq_jax.errors import (
    InputError,
    betas,
    check_fields,
    check_settings,
    choice,
    decay,
    increasing_epochs,
    real,
    setting,
    truth,
    whole,
)

OBJECTIVES = ("adadfq", "gdfq")
STUDENT_OPTIMIZERS = ("sgd", "adam")
LARGEST = 2**16  # of what arrays are made by: a slip of the hand shall not fill the memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Learning rates and their decays.

    Attributes:
      student_optimizer: ``"sgd"``, with Nesterov momentum, or ``"adam"``.
      student_lr: learning rate of the student.
      student_momentum: momentum of SGD, decay rate of Adam's first moments (that of the second ones is 0.999).
      student_weight_decay: L2 term on every parameter, batch norms and biases included.
      student_ema_decay: of the moving average of the student's parameters over its steps, which is then
        what a run gives; 0 gives the parameters themselves.
      generator_lr: of Adam.
      generator_betas: its decay rates.
      decay_epochs: both rates fall to a tenth at each.
      cosine_epochs: the student's rate also falls along half a cosine, from the end of the warm-up to zero after so
        many epochs of the run; 0 leaves the cosine out. The generator's rate does not fall with it.
      steps_per_epoch: length of an epoch.
      warmup_epochs: epochs at the start in which only the generator moves.
    """

    student_optimizer: str = setting("sgd", choice(*STUDENT_OPTIMIZERS))
    student_lr: float = setting(1e-4, real(0))
    student_momentum: float = setting(0.9, decay())
    student_weight_decay: float = setting(1e-4, real(0))
    student_ema_decay: float = setting(0.0, decay())
    generator_lr: float = setting(1e-3, real(0))
    generator_betas: tuple[float, float] = setting((0.5, 0.999), betas())
    decay_epochs: tuple[int, ...] = setting((100, 200, 300), increasing_epochs())
    cosine_epochs: int = setting(0, whole(0))
    steps_per_epoch: int = setting(200, whole(1))
    warmup_epochs: int = setting(4, whole(0))

    def __post_init__(self) -> None:
        check_settings(self)
        if 0 < self.cosine_epochs <= self.warmup_epochs:
            raise InputError(
                f"OptimizerSettings.cosine_epochs: got {self.cosine_epochs}, allowed are 0 and whole numbers above "
                f"warmup_epochs, {self.warmup_epochs}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The losses, and the weights of their terms.

    - ``"adadfq"``: L_G = hinge hinge' + beta (alpha_ds ds + alpha_as as + alpha_label CE(t, y)) + gamma BNS,
      L_S = distillation + attention, with hinge' the balance hinge;
    - ``"gdfq"``: L_G = beta CE(t, y) + gamma BNS, L_S = label distillation + attention.

    Attributes:
      objective: ``"adadfq"``, which GranQ trains with too, or ``"gdfq"``; see :mod:`granq_jax.distill.losses`.
      hinge: weight of the balance hinge.
      alpha_ds: weight of the discrepancy, which makes the generator an adversary of the student.
      alpha_as: weight of the agreement.
      alpha_label: weight of the cross-entropy of the teacher's logits and the label. Where ``hinge``, ``alpha_ds`` and
        ``alpha_as`` are 0, the generator does not look at the student, and a step is cheaper.
      beta: weight of these cross-entropies together.
      gamma: weight of the batch-norm statistics.
      lambda_lower: lower bound of the balance hinge.
      lambda_upper: upper bound of the balance hinge.
      temperature: of the distillation.
      attention: weight of :func:`granq_jax.distill.losses.attention_distillation`, between the last activations
        of each resolution; 0 leaves it out.
    """

    objective: str = setting("adadfq", choice(*OBJECTIVES))
    hinge: float = setting(1.0, real(0))
    alpha_ds: float = setting(0.2, real(0))
    alpha_as: float = setting(0.1, real(0))
    alpha_label: float = setting(0.0, real(0))
    beta: float = setting(1.0, real(0))
    gamma: float = setting(1.0, real(0))
    lambda_lower: float = setting(0.1, real(0, 1))
    lambda_upper: float = setting(0.8, real(0, 1))
    temperature: float = setting(20.0, real(0, low_open=True))
    attention: float = setting(0.0, real(0))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.lambda_lower > self.lambda_upper:
            raise InputError(
                f"LossSettings.lambda_lower: got {self.lambda_lower}, allowed are numbers up to "
                f"LossSettings.lambda_upper, {self.lambda_upper}"
            )

    @property
    def watches_student(self) -> bool:
        """Whether the generator's loss depends on the student."""
        return self.objective == "adadfq" and bool(self.hinge or self.beta * (self.alpha_ds + self.alpha_as))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """SGD with Nesterov momentum 0.9 and a cosine schedule down to zero.

    Attributes:
      epochs: passes over the training images.
      batch_size: images a step, over all devices; a last, smaller batch of an epoch is left out.
      lr: greatest learning rate, reached after a tenth of the steps.
      weight_decay: L2 term on every parameter.
      label_smoothing: share of the target that is spread over all classes.
      max_shift: images are moved by up to so many pixels each way, edges filled with zeros;
        photographs are cropped at random instead.
      flip: whether half of the images are mirrored.
      small_size: height and width of the images in the first ``small_epochs``: windows of the small
        images, resized parts of photographs. They cost less and hardly teach less.
      small_epochs: how many epochs begin the training so; 0 is none.
      seed: of initialisation, order and augmentation.

    Raises:
      InputError: for a value that is not allowed.
    """

    epochs: int = setting(50, whole(1))
    batch_size: int = setting(128, whole(2, LARGEST))
    lr: float = setting(0.2, real(0, low_open=True))
    weight_decay: float = setting(5e-4, real(0))
    label_smoothing: float = setting(0.0, real(0, 1))
    max_shift: int = setting(4, whole(0, 224))
    flip: bool = setting(True, truth())
    small_size: int = setting(24, whole(1))
    small_epochs: int = setting(0, whole(0))
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        check_fields(self, {"seed": whole(0)})
        if self.small_epochs > self.epochs:
            raise InputError(
                f"PretrainSettings.small_epochs: got {self.small_epochs}, allowed are whole numbers up to "
                f"PretrainSettings.epochs, {self.epochs}"
            )
