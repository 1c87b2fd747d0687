"""Fake quantization of activations with a range for each (sample, channel): Pallas, Triton backend.

One program handles one sample and a block of channels: it reads the (pixels, channels) tile, reduces
it to ranges, and writes the rounded tile. Where the tile fits in registers it is read once, which is
the least that is possible; a larger one is read twice, chunk by chunk, the second time through L2.

Not run on a GPU so far: it is tested in interpret mode and lowered for CUDA and ROCm.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MIN_RANGE = 1e-8

# Elements of a tile held in registers by a program of MAX_WARPS warps: 32 for each thread.
TILE_ELEMENTS = 16384
MAX_WARPS = 16
ELEMENTS_PER_WARP = TILE_ELEMENTS // MAX_WARPS
# A row of a tile is contiguous in memory; 8 float32 fill the 32 bytes that a GPU fetches at least.
MIN_CHANNELS, MAX_CHANNELS = 8, 64


def reference(x: jax.Array, bits: int) -> jax.Array:
    """What the kernel computes, in plain ``jax.numpy``: (N, H, W, C) to the same."""
    half = 2 ** (bits - 1)
    v = x.astype(jnp.float32)
    low, high = jnp.min(v, (1, 2), keepdims=True), jnp.max(v, (1, 2), keepdims=True)
    scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
    zero = jnp.round(scale * low) + half
    codes = jnp.clip(jnp.round(scale * v - zero), -half, half - 1)
    return ((codes + zero) / scale).astype(x.dtype)


def fake_quant(x: jax.Array, bits: int, *, interpret: bool = False) -> jax.Array:
    """Fake quantization of ``x`` (N, H, W, C), float32, bfloat16 or float16; arithmetic in float32.

    Args:
      x: any H, W and C.
      bits: 2 to 8.
      interpret: run by Pallas' interpreter, on any platform, instead of compiled for a GPU.
    """
    n, height, width, channels = x.shape
    pixels = height * width
    rows, columns = tile_shape(pixels, channels)
    chunks = pl.cdiv(pixels, rows)
    block = pl.BlockSpec((None, chunks * rows, columns), lambda sample, block: (sample, 0, block))
    warps = max(1, min(MAX_WARPS, rows * columns // ELEMENTS_PER_WARP))
    y = pl.pallas_call(
        partial(_kernel, bits=bits, pixels=pixels, channels=channels, rows=rows, columns=columns, chunks=chunks),
        out_shape=jax.ShapeDtypeStruct((n, pixels, channels), x.dtype),
        grid=(n, pl.cdiv(channels, columns)),
        in_specs=[block],
        out_specs=block,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name="fake_quant_sample_channel",
    )(x.reshape(n, pixels, channels))
    return y.reshape(x.shape)


def tile_shape(pixels: int, channels: int) -> tuple[int, int]:
    """Rows (pixels) and columns (channels) of a tile: powers of two, at most TILE_ELEMENTS in all.

    Example:
      >>> tile_shape(32 * 32, 16), tile_shape(7 * 7, 960), tile_shape(112 * 112, 64)
      ((1024, 16), (64, 64), (2048, 8))
    """
    all_rows = pl.next_power_of_2(pixels)
    fitting = TILE_ELEMENTS // all_rows
    columns = min(pl.next_power_of_2(channels), max(MIN_CHANNELS, min(MAX_CHANNELS, fitting)))
    return min(all_rows, TILE_ELEMENTS // columns), columns


def _round_half_to_even(v):
    # Triton's lowering has a floor but no rounding.
    below = jnp.floor(v)
    rest = v - below
    odd = below != 2 * jnp.floor(below / 2)
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)


def _kernel(x_ref, y_ref, *, bits, pixels, channels, rows, columns, chunks):
    half = 2 ** (bits - 1)
    in_channels = pl.program_id(1) * columns + jnp.arange(columns) < channels

    def load(chunk):
        mask = (chunk * rows + jnp.arange(rows) < pixels)[:, None] & in_channels[None, :]
        tile = x_ref.at[pl.ds(chunk * rows, rows), :]
        return plgpu.load(tile, mask=mask, other=0.0).astype(jnp.float32), mask

    def ranges(chunk, so_far):
        low, high, nan = so_far
        v, mask = load(chunk)
        low = jnp.minimum(low, jnp.min(jnp.where(mask, v, jnp.inf), axis=0))
        high = jnp.maximum(high, jnp.max(jnp.where(mask, v, -jnp.inf), axis=0))
        # On a GPU minimum and maximum pass over NaN, so it is looked for.
        nan = jnp.maximum(nan, jnp.max(jnp.where(v != v, 1.0, 0.0), axis=0))
        return low, high, nan

    start = (jnp.full((columns,), jnp.inf), jnp.full((columns,), -jnp.inf), jnp.zeros((columns,)))
    low, high, nan = ranges(0, start) if chunks == 1 else jax.lax.fori_loop(0, chunks, ranges, start)
    scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
    zero = _round_half_to_even(scale * low) + half
    scale = jnp.where(nan > 0, jnp.nan, scale)[None, :]
    zero = zero[None, :]

    def quantize(chunk, _):
        v, mask = load(chunk)
        codes = jnp.clip(_round_half_to_even(scale * v - zero), -half, half - 1)
        y = ((codes + zero) / scale).astype(y_ref.dtype)
        plgpu.store(y_ref.at[pl.ds(chunk * rows, rows), :], y, mask=mask)

    if chunks == 1:
        quantize(0, None)
    else:
        jax.lax.fori_loop(0, chunks, quantize, None)
