"""Activations to int8 codes, with a scale and zero point for each (sample, channel).

The way back needs no kernel: XLA fuses it into one read and one write by itself.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE
from granq_jax.kernels.sweeps import Task, quantized
from granq_jax.kernels.tiles import tiling

NAME = "quantize_sample_channel"


def reference(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What :func:`quantize` computes, in plain ``jax.numpy``."""
    half, axes = 2 ** (bits - 1), tuple(range(1, x.ndim - 1))
    v = x.astype(jnp.float32)
    low, high = jnp.min(v, axes, keepdims=True), jnp.max(v, axes, keepdims=True)
    scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
    zero = jnp.round(scale * low) + half
    return jnp.clip(jnp.round(scale * v - zero), -half, half - 1).astype(jnp.int8), scale, zero


def quantize(x: jax.Array, bits: int, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and zero points of ``x``.

    Args:
      x: (N, ..., C) of any size; float32, bfloat16 or float16.
      bits: 2 to 8.
      interpret: as in :func:`granq_jax.kernels.sample_channel.fake_quant`.

    Returns:
      int8 of the shape of ``x``, and twice float32 (N, 1, ..., 1, C). The scale of a channel that holds a NaN
      or infinity is NaN, its codes are arbitrary.
    """
    samples, pixels, channels = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]
    tiles = tiling(samples, pixels, channels, x.dtype.itemsize, written_itemsize=1)
    task = Task(NAME, tiles, bits, maps=1, before=lambda maps, rows: maps[0], integers=True)
    codes, scale, zero = quantized(task, [x.reshape(samples, pixels, channels)], [], interpret=interpret)
    kept = (samples, *(1,) * (x.ndim - 2), channels)
    return codes.reshape(x.shape), scale.reshape(kept), zero.reshape(kept)
