"""Fake quantization of activations with a range for each (sample, channel), and what comes right before it.

One launch reads the activation once, and the residual if there is one, and writes the result once, where a
channel map fits in registers; see :mod:`granq_jax.kernels.tiles` for when it does not.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE
from granq_jax.kernels.sweeps import Block
from granq_jax.kernels.tiles import Tiling, tiling
from granq_jax.kernels.triton import BlockSpec, launch

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
    scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
    zero = jnp.round(scale * low) + half
    codes = jnp.clip(jnp.round(scale * v - zero), -half, half - 1)
    return ((codes + zero) / scale).astype(x.dtype)


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
    tiles = tiling(samples, pixels, channels, x.dtype.itemsize)
    maps = [x] if residual is None else [x, residual]
    norms = [] if norm is None else [norm]
    block = BlockSpec((None, tiles.padded_pixels, tiles.columns), lambda sample, block: (sample, 0, block))
    pair = BlockSpec((tiles.pair_rows, tiles.columns), lambda sample, block: (0, block))
    y = launch(
        partial(_kernel, bits=bits, tiles=tiles, maps=len(maps), activation=activation),
        name=name,
        grid=(samples, tiles.blocks),
        in_specs=[block] * len(maps) + [pair] * len(norms),
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((samples, pixels, channels), x.dtype),
        warps=tiles.warps,
        interpret=interpret,
    )(*(a.reshape(samples, pixels, channels) for a in maps), *norms)
    return y.reshape(x.shape)


def activate(v: jax.Array, activation: str | None) -> jax.Array:
    """ReLU, ReLU6 or nothing; NaN stays NaN on a GPU as well, where ``jnp.maximum`` would make it 0."""
    if activation is not None:
        v = jnp.where(v <= 0, 0.0, v)
    if activation == "relu6":
        v = jnp.where(v >= 6, 6.0, v)
    return v


def _kernel(*refs, bits: int, tiles: Tiling, maps: int, activation: str | None):
    *in_refs, y_ref = refs
    x_ref, *residual_refs = in_refs[:maps]
    block = Block(tiles)
    norms = [block.load_pair(ref) for ref in in_refs[maps:]]

    def read(place):
        v = place.load(x_ref)
        for factor, shift in norms:
            v = v * factor[None, :] + shift[None, :]
        for residual_ref in residual_refs:
            v = v + place.load(residual_ref)
        return activate(v, activation)

    def write(place, codes, scale, zero):
        place.store(y_ref, (codes + zero) / scale)

    block.quantize(bits, read, write)
