"""Fake quantization of activations with a range for each (sample, channel), and what comes right before it.

One launch reads the activation once, and the residual if there is one, and writes the result once, where a
channel map fits in registers; see :mod:`granq_jax.kernels.tiles` for when it does not.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE
from granq_jax.kernels.sweeps import Task, quantized
from granq_jax.kernels.tiles import tiling

NAME = "fake_quant_sample_channel"


def reference(
    x: jax.Array,
    bits: int,
    *,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
) -> jax.Array:
    """What :func:`fake_quant` computes, in plain ``jax.numpy``."""
    half, axes = 2 ** (bits - 1), tuple(range(1, x.ndim - 1))
    v = x.astype(jnp.float32)
    if norm is not None:
        factor, shift = (jnp.expand_dims(row, tuple(range(x.ndim - 1))) for row in norm)
        v = v * factor + shift
    if residual is not None:
        v = v + residual.astype(jnp.float32)
    v = activate(v, activation)
    low, high = jnp.min(v, axes, keepdims=True), jnp.max(v, axes, keepdims=True)
    width, levels = jnp.maximum(high - low, MIN_RANGE), 2**bits - 1
    scale, step = levels / width, width * (1 / levels)
    zero = jnp.round(scale * low) + half
    codes = jnp.clip(jnp.round(scale * v - zero), -half, half - 1)
    return ((codes + zero) * step).astype(x.dtype)


def fake_quant(
    x: jax.Array,
    bits: int,
    *,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
    interpret: bool = False,
    name: str = NAME,
) -> jax.Array:
    """Fake quantization of ``activation(norm(x) + residual)``, each part of which may be missing.

    Args:
      x: (N, ..., C) of any size; float32, bfloat16 or float16. The arithmetic is in float32.
      bits: 2 to 8.
      norm: factor and shift of every channel, (2, C) float32: a batch norm that is not training.
      residual: of the shape and dtype of ``x``.
      activation: ``"relu"`` or ``"relu6"``.
      interpret: run by Pallas' interpreter, on any platform, instead of compiled for a GPU.
      name: of the kernel, in programs and profiles.

    Returns:
      An array of the shape and dtype of ``x``.
    """
    samples, pixels, channels = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]

    def before(maps, rows):
        v, *residuals = maps
        if rows:
            factor, shift = rows
            v = v * factor + shift
        for summand in residuals:
            v = v + summand
        return activate(v, activation)

    maps = [x] if residual is None else [x, residual]
    task = Task(name, tiling(samples, pixels, channels, x.dtype.itemsize), bits, len(maps), before)
    norms = [] if norm is None else [norm]
    y = quantized(task, [a.reshape(samples, pixels, channels) for a in maps], norms, interpret=interpret)
    return y.reshape(x.shape)


def activate(v: jax.Array, activation: str | None) -> jax.Array:
    """ReLU, ReLU6 or nothing; NaN stays NaN on a GPU as well, where ``jnp.maximum`` would make it 0."""
    if activation is not None:
        v = jnp.where(v <= 0, 0.0, v)
    if activation == "relu6":
        v = jnp.where(v >= 6, 6.0, v)
    return v
