"""Sums over all axes but the channels, which are last, and numbers a channel whose gradients are such sums.

XLA for GPUs sums a few thousand pixels in one block of threads or two: on an H200, 26 us for 4096 pixels of 32
channels, and up to ten times that where what is summed is computed from several arrays. In two stages many blocks take
part in the first. ResNet-20's joint step of batch 16 spent 2.0 ms of the device's time in reductions before, and 1.2
after, on a card that other programs used too.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from granq_jax.runtime.platforms import by_platform

# With fewer pixels a second launch takes longer than one block.
_FEW_PIXELS = 256


def channel_means(x: jax.Array) -> jax.Array:
    """Mean of every channel of ``x`` (N, ..., C), in the dtype of ``x``: (C,).

    Examples:
      >>> channel_means(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
      [2.0, 3.0]
    """
    axes = tuple(range(x.ndim - 1))
    if (groups := _groups(x)) == 1:
        return jnp.mean(x, axes)
    count = x.size // x.shape[-1]
    return by_platform(
        x, cpu=partial(jnp.mean, axis=axes), default=lambda x: (_in_two_stages(x, groups) / count).astype(x.dtype)
    )


def channel_sums(x: jax.Array) -> jax.Array:
    """Sum of every channel of ``x`` (N, ..., C), in the dtype of ``x``: (C,).

    Examples:
      >>> channel_sums(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
      [4.0, 6.0]
    """
    axes = tuple(range(x.ndim - 1))
    if (groups := _groups(x)) == 1:
        return jnp.sum(x, axes)
    return by_platform(x, cpu=partial(jnp.sum, axis=axes), default=lambda x: _in_two_stages(x, groups).astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def over_pixels(number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``number`` (C,) at every pixel of an array of ``shape`` (N, ..., C); its gradient is a :func:`channel_sums`.

    It has gradients in reverse mode only.

    Examples:
      >>> over_pixels(jnp.array([1.0, 2.0]), (2, 2)).tolist()
      [[1.0, 2.0], [1.0, 2.0]]
    """
    return jnp.broadcast_to(jnp.expand_dims(number, tuple(range(len(shape) - 1))), shape)


def _forward(number, shape):
    return over_pixels(number, shape), None


def _backward(shape, _, cotangent):
    return (channel_sums(cotangent),)


over_pixels.defvjp(_forward, _backward)


def _groups(x):
    """In how many groups the pixels are summed first: the divisor of their number that is nearest its root, or 1."""
    pixels = x.size // max(1, x.shape[-1])
    if pixels <= _FEW_PIXELS:
        return 1
    return next(groups for groups in range(math.isqrt(pixels), 0, -1) if pixels % groups == 0)


def _in_two_stages(x, groups):
    """In float32 at least, so that the sums of the groups are not rounded to less."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    of_groups = jnp.sum(x.reshape(groups, -1, x.shape[-1]), 1, dtype=wide)
    # Or XLA makes them one again.
    return jnp.sum(jax.lax.optimization_barrier(of_groups), 0)
