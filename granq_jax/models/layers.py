"""Layers that the networks share. They know nothing of quantization."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from granq_jax.errors import InputError
from granq_jax.ops.convolution import convolve
from granq_jax.ops.reductions import channel_means, over_pixels

NORM_EPSILON = 1e-5
ACTIVATIONS = {"relu": nn.relu, "relu6": nn.relu6}


class Activation(nn.Module):
    """A non-linearity as a module of its own, so that a transform of the model can find it.

    Attributes:
      kind: ``"relu"`` or ``"relu6"``.

    Raises:
      InputError: for another kind.
    """

    kind: str = "relu"

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise InputError(f"Activation.kind: got {self.kind!r}, allowed are {', '.join(map(repr, ACTIVATIONS))}")
        super().__post_init__()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Element by element."""
        return ACTIVATIONS[self.kind](x)


class FrozenBatchNorm(nn.BatchNorm):
    """``flax.linen.BatchNorm`` by its running averages, with gradients that are summed as GPUs do it well."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # nothing to choose, nothing masked
        """(N, ..., C), normalised by channel."""
        params, statistics = self.variables["params"], self.variables["batch_stats"]
        factor = jax.lax.rsqrt(statistics["var"] + self.epsilon) * params["scale"]
        dtype = jnp.result_type(x, params["scale"], params["bias"])
        return frozen_norm(x, statistics["mean"], factor, params["bias"]).astype(dtype)


def frozen_norm(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array) -> jax.Array:
    """``(x - mean) * factor + bias`` of ``x`` (N, ..., C) and numbers (C,)."""
    dtype = jnp.result_type(x, mean, factor, bias)  # in which gradients are summed
    mean, factor, bias = (over_pixels(number.astype(dtype), x.shape) for number in (mean, factor, bias))
    return (x - mean) * factor + bias


class NormAct(nn.Module):
    """Batch norm, then an optional residual sum, then an optional activation: one neutral unit.

    Attributes:
      activation: of :class:`Activation`, or ``None`` for none.
    """

    activation: str | None = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None, *, train: bool) -> jax.Array:
        """``activation(norm(x) + residual)``, all (N, H, W, C)."""
        norm = nn.BatchNorm if train or self.is_initializing() else FrozenBatchNorm
        x = norm(use_running_average=not train, momentum=0.9, epsilon=NORM_EPSILON, name="bn")(x)
        if residual is not None:
            x = x + residual
        return x if self.activation is None else Activation(self.activation, name="act")(x)


class ConvNormAct(nn.Module):
    """Convolution without bias, padded to keep the size at stride 1, then :class:`NormAct`.

    Attributes:
      depthwise: whether every channel is convolved by itself; ``features`` is then their number.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    activation: str | None = "relu"
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features), the shape of ``residual``."""
        size, pad = (self.kernel_size,) * 2, self.kernel_size // 2
        groups = self.features if self.depthwise else 1
        conv = nn.Conv(
            self.features,
            size,
            self.strides,
            padding=pad,
            feature_group_count=groups,
            use_bias=False,
            conv_general_dilated=convolve,
            name="conv",
        )
        x = conv(x)
        return NormAct(self.activation, name="norm")(x, residual, train=train)


def batch_moments(x: jax.Array, axis_name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every channel of ``x`` (N, ..., C), both (C,).

    Args:
      x: float array, channels last.
      axis_name: mapped axis that splits the batch; the moments are then those of the whole batch.
    """
    mean, variance = _moments(x)
    return (mean, variance) if axis_name is None else moments_of_all(mean, variance, axis_name)


@jax.custom_vjp
def _moments(x):
    return _two_sweeps(x)


def _forward(x):
    mean, variance = _two_sweeps(x)
    return (mean, variance), (x, mean)


def _backward(residuals, cotangents):
    return (_to_x(*residuals, *cotangents),)


_moments.defvjp(_forward, _backward)


# Both are jitted within what is differentiated, so that the batch norms of one shape are traced once.
@jax.jit
def _two_sweeps(x):
    """Instead of E[x^2] - E[x]^2, which loses all digits where the mean is large."""
    mean = channel_means(x)
    return mean, channel_means(jnp.square(x - jnp.expand_dims(mean, tuple(range(x.ndim - 1)))))


@jax.jit
def _to_x(x, mean, to_mean, to_variance):
    """The formula's gradient without a term that is zero: deviations from the mean add up to nothing."""
    spread = (1,) * (x.ndim - 1) + (-1,)
    to_mean, slope = (c.reshape(spread) / (x.size // x.shape[-1]) for c in (to_mean, 2 * to_variance))
    return to_mean + slope * (x - mean.reshape(spread))


def moments_of_all(mean: Any, variance: Any, axis_name: str) -> tuple[Any, Any]:
    """Means and biased variances over all devices from those over each one's equal share, exchanged at once.

    The mean is that of the means, the variance the mean of the variances plus the variance of the means (Chan,
    Golub and LeVeque, 1983).

    Args:
      mean: a tree of arrays.
      variance: a tree of the same structure.
      axis_name: mapped axis.

    Examples:
      >>> over_two = jax.vmap(lambda *moments: moments_of_all(*moments, "batch"), axis_name="batch")
      >>> mean, variance = over_two(jnp.array([[1.0], [3.0]]), jnp.array([[0.5], [0.5]]))
      >>> mean[0].tolist(), variance[0].tolist()
      ([2.0], [1.5])
    """
    if jax.lax.axis_size(axis_name) == 1:
        return mean, variance
    means, unravel = ravel_pytree(mean)
    variances, _ = ravel_pytree(variance)
    means, variances = jax.lax.all_gather(jnp.stack([means, variances]), axis_name, axis=1)
    of_all = jnp.mean(means, 0)
    return unravel(of_all), unravel(jnp.mean(variances + jnp.square(means - of_all[None]), 0))
