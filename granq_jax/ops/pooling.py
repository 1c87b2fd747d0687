"""Max pooling whose gradient keeps one byte for each output."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

WINDOW, STRIDE, PAD = 3, 2, 1


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Largest value of each 3x3 window, two pixels apart, the border padded by one: (N, H, W, C).

    The gradient goes to the first pixel, row by row, that has the largest value. Only which one that is is kept
    for it, in a byte: ``flax.linen.max_pool``'s gradient needs the input again, or compiled for a GPU four int32.
    """
    return nn.max_pool(x, (WINDOW, WINDOW), (STRIDE, STRIDE), ((PAD, PAD), (PAD, PAD)))


def _forward(x):
    y = max_pool(x)
    first = jnp.zeros(y.shape, jnp.uint8)
    padded = jnp.pad(x, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), constant_values=-jnp.inf)
    for tap in reversed(range(WINDOW * WINDOW)):
        first = jnp.where(_taps_of(padded, tap, y.shape) == y, jnp.uint8(tap), first)
    # Together, or a compiler finds the pixels on the way back, and keeps the whole input for that.
    y, first = jax.lax.optimization_barrier((y, first))
    return y, (first, x.shape)


def _taps_of(padded, tap, shape):
    """The pixel ``tap`` of every window."""
    row, column = divmod(tap, WINDOW)
    rows, columns = (STRIDE * size for size in shape[1:3])
    return padded[:, row : row + rows : STRIDE, column : column + columns : STRIDE]


def _backward(kept, cotangent):
    first, shape = kept
    total = jnp.zeros(shape, cotangent.dtype)
    for tap in range(WINDOW * WINDOW):
        share = jnp.where(first == tap, cotangent, 0)
        config = [(0, 0, 0)]
        for offset, size, pooled in zip(divmod(tap, WINDOW), shape[1:3], cotangent.shape[1:3], strict=True):
            low = offset - PAD  # negative where it lies in the padding, which is cut off
            config.append((low, size - low - (STRIDE * (pooled - 1) + 1), STRIDE - 1))
        total = total + jax.lax.pad(share, jnp.zeros((), share.dtype), [*config, (0, 0, 0)])
    return (total,)


max_pool.defvjp(_forward, _backward)
