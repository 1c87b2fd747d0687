"""The losses of generator and student, one pure function each.

``teacher`` and ``student`` are logits (N, C), ``labels`` integers (N,), t and s stand for the
logits of one sample. H is the entropy in nats. All is computed in float32 at least, whatever a model
computes in. The discrepancy, agreement, balance and distillation terms are those of AdaDFQ (Qian et
al., CVPR 2023), which GranQ trains with; the batch-norm statistics loss and the label distillation
are those of GDFQ (Xu et al., ECCV 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Keeps the normalised entropy finite where all samples have the greatest entropy, log C. It is
# about the resolution of float32 near log C.
_MIN_ENTROPY_SPAN = 1e-6


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 at least: where bfloat16 has left, what a loss compares is a few units of the last place.

    Examples:
      >>> import jax.numpy as jnp
      >>> wide(jnp.ones(1, jnp.bfloat16)).dtype, wide(jnp.ones(1, jnp.float32)).dtype
      (dtype('float32'), dtype('float32'))
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def entropy(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """H(softmax(logits / temperature)) of every row: (N, C) to (N,).

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(entropy(jnp.zeros((1, 4)))[0]), 4)  # log 4
      1.3863
    """
    log_p = jax.nn.log_softmax(wide(logits) / temperature)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def label_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits (N, C) and labels (N,), a scalar."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(wide(logits), labels))


def discrepancy(teacher: jax.Array, student: jax.Array, labels: jax.Array) -> jax.Array:
    """``ds``: mean cross-entropy of t - s and the label, a scalar; small where only the teacher knows it."""
    return label_cross_entropy(wide(teacher) - wide(student), labels)


def agreement(teacher: jax.Array, student: jax.Array, labels: jax.Array) -> jax.Array:
    """``as``: mean cross-entropy of t + s and the label, a scalar; small where both know it."""
    return label_cross_entropy(wide(teacher) + wide(student), labels)


def balance_hinge(
    teacher: jax.Array, student: jax.Array, lower: float, upper: float, axis_name: str | None = None
) -> jax.Array:
    """Keeps the disagreement of teacher and student between two bounds: a scalar.

    With h = H(softmax(t - s)) and h' = (h - min h) / (log C - min h), the mean over the samples of
    max(lower - h', 0) + max(h' - upper, 0).

    Args:
      teacher: (N, C).
      student: (N, C).
      lower: bound in [0, 1].
      upper: bound in [0, 1].
      axis_name: mapped axis that splits the batch; min h is then taken over all of it. (Gathered
        and reduced, since the gradient flows through the minimum and ``lax.pmin`` has none.)
    """
    h = entropy(wide(teacher) - wide(student))
    everyone = h if axis_name is None else jax.lax.all_gather(h, axis_name, tiled=True)
    # By its place: the gradient of jnp.min looks for equal values, and where a compiler computes h once more with
    # another rounding, as XLA does on GPUs, it finds none and divides by zero.
    least = everyone[jnp.argmin(everyone)]
    greatest = jnp.log(jnp.asarray(teacher.shape[-1], h.dtype))
    span = greatest - least
    normalised = (h - least) / jnp.where(span > _MIN_ENTROPY_SPAN, span, _MIN_ENTROPY_SPAN)
    return jnp.mean(jax.nn.relu(lower - normalised)) + jnp.mean(jax.nn.relu(normalised - upper))


def batch_norm_statistics(
    moments: Sequence[tuple[jax.Array, jax.Array]], running: Sequence[tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """BNS: how far a batch is from the statistics the teacher was trained on, a scalar.

    The mean over the batch norms of MSE(mean, running mean) + MSE(variance, running variance).

    Args:
      moments: mean and biased variance (C,) of the input of each batch norm.
      running: the running mean and variance (C,) of each, in the same order.
    """
    squares = [
        jnp.square(wide(mean) - wide(running_mean)) + jnp.square(wide(var) - wide(running_var))
        for (mean, var), (running_mean, running_var) in zip(moments, running, strict=True)
    ]
    # One sum over all batch norms: a mean of each would be several small operations to compile and to start.
    shares = np.concatenate([np.full(x.size, 1 / (x.size * len(squares)), x.dtype) for x in squares])
    return jnp.sum(jnp.concatenate(squares) * shares)


def distillation(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """L_S = -T^2 mean H(softmax((t - s) / T)), a scalar; least where t - s is the same for all classes."""
    return -(temperature**2) * jnp.mean(entropy(wide(teacher) - wide(student), temperature))


def label_distillation(teacher: jax.Array, student: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """GDFQ's L_S, a scalar: ``T^2 mean KL(softmax(t / T) || softmax(s / T)) + mean CE(s, y)``.

    The first mean is over samples and classes alike, as the released code of GDFQ has it, so that its weight is a
    C-th of what is usual.
    """
    teacher, student = wide(teacher), wide(student)  # once, so that the gradients of both terms add up in float32
    log_t, log_s = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    divergence = jnp.mean(jnp.exp(log_t) * (log_t - log_s))
    return temperature**2 * divergence + label_cross_entropy(student, labels)


def attention_distillation(
    teachers: Sequence[jax.Array], students: Sequence[jax.Array], temperature: float = 8.0, weight: float = 1000.0
) -> jax.Array:
    """The refined feature distillation of AKT (Hong et al., ACM SAC 2025), a scalar.

    A feature map x gives a channel attention, softmax over C of the mean of x^2 over the pixels, and
    a spatial one, the mean of x^2 over C, scaled to unit 2-norm over the pixels. Each is softened by
    softmax(. / temperature); the loss is ``weight`` times the sum over maps, samples and both kinds
    of KL(teacher || student).

    Args:
      teachers: feature maps (N, H, W, C).
      students: feature maps of the same shapes.
      temperature: of the softened attentions.
      weight: of the sum.
    """

    def attentions(x):
        energy = jnp.square(wide(x))
        spatial = jnp.mean(energy, axis=-1).reshape(x.shape[0], -1)
        # The bound lies under the root, which has no gradient at 0: a map may be all zeros.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(spatial), axis=-1, keepdims=True), 1e-24))
        return jax.nn.softmax(jnp.mean(energy, axis=(1, 2))), spatial / norm

    def divergence(teacher, student):
        log_t, log_s = (jax.nn.log_softmax(a / temperature) for a in (teacher, student))
        return jnp.sum(jnp.exp(log_t) * (log_t - log_s))

    return weight * sum(
        divergence(of_teacher, of_student)
        for teacher, student in zip(teachers, students, strict=True)
        for of_teacher, of_student in zip(attentions(teacher), attentions(student), strict=True)
    )
