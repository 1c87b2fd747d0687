"""The plain kernel of :mod:`granq_jax.kernels.sample_channel` on Pallas' Mosaic GPU backend, the successor of Triton's.

For Hopper and later, and JAX 0.12: what that backend can and cannot do is in ``docs/gpu.md``. A program is a warpgroup.
Tiles are read from memory to registers without masks, so the last one of an image that they do not divide begins early
enough to end with the image: its first pixels are read, and written, twice, with the same values. Minimum and maximum
keep NaN here, and rounding is half to even.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE
from granq_jax.kernels.gpus import check_capability
from granq_jax.kernels.tiles import MIN_ROW_BYTES, VECTOR_BYTES, WARP
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NAME = "fake_quant_sample_channel_mosaic"
LEAST_JAX = (0, 12)
_LEAST_CAPABILITY = 9.0  # Hopper; for others its compiler ends the process
_WARPS = 4
_THREADS = WARP * _WARPS
_MAX_ELEMENTS = 64  # of a thread: with more in registers, an image is read twice
_SCRATCH_BYTES = 16 * 1024  # of shared memory, where warps exchange what they found


def columns(pixels: int, channels: int, itemsize: int) -> int | None:
    """Channels of a block: the fewest that fill a sector of memory and whose tiles are no higher than an image.

    Returns:
      ``None`` for arrays that have no such block: the kernel does not cover them.

    Examples:
      >>> columns(7 * 7, 960, 4), columns(1, 960, 4), columns(32 * 32, 10, 2)
      (16, None, None)
    """
    vector = VECTOR_BYTES // itemsize
    block = MIN_ROW_BYTES // itemsize
    while block < vector * WARP and channels % block == 0:
        if pixels * block >= _THREADS * vector:
            return block
        block *= 2
    return None


def covers(x: jax.Array) -> bool:
    """Whether :func:`columns` has a block for ``x``, (N, ..., C)."""
    return columns(math.prod(x.shape[1:-1]), x.shape[-1], x.dtype.itemsize) is not None


def fake_quant(x: jax.Array, bits: int, *, interpret: bool = False) -> jax.Array:
    """As :func:`granq_jax.kernels.sample_channel.fake_quant`, with nothing before the quantizer.

    Raises:
      NotImplementedError: for arrays that :func:`columns` has no block for, for GPUs before Hopper, and by a JAX
        before 0.12, whose Mosaic GPU neither reads such tiles from memory nor writes them.
    """
    if jax.__version_info__ < LEAST_JAX:
        raise NotImplementedError(f"JAX {jax.__version__}, allowed are {'.'.join(map(str, LEAST_JAX))} and later")
    if not interpret:
        check_capability(_LEAST_CAPABILITY)
    samples, pixels, channels = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]
    block = columns(pixels, channels, x.dtype.itemsize)
    if block is None:
        raise NotImplementedError(f"no block of channels for {pixels} pixels of {channels} channels in {x.dtype}")
    y = plgpu.kernel(
        functools.partial(_kernel, bits=bits, columns=block),
        out_type=jax.ShapeDtypeStruct((samples, pixels, channels), x.dtype),
        grid=(samples, channels // block),
        grid_names=("sample", "block"),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=_SCRATCH_BYTES),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=NAME,
    )(x.reshape(samples, pixels, channels))
    return y.reshape(x.shape)


def _layout(columns: int, itemsize: int) -> tuple[int, Any]:
    """Rows of a tile in which each thread has 16 bytes, and which thread has which."""
    vector = VECTOR_BYTES // itemsize
    warp_rows = WARP * vector // columns
    rows = _WARPS * warp_rows
    tiling = plgpu.Tiling(((rows, columns), (warp_rows, columns), (vector,)))
    return rows, plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _kernel(x_ref, y_ref, *, bits: int, columns: int):
    pixels, dtype = x_ref.shape[1], x_ref.dtype
    rows, layout = _layout(columns, dtype.itemsize)
    sample, first = jax.lax.axis_index("sample"), jax.lax.axis_index("block") * columns
    loops, rest = divmod(pixels, rows)

    def place(start):
        return sample, pl.ds(start, rows), pl.ds(first, columns)

    def read(start):
        return plgpu.load(x_ref.at[place(start)], layout=layout, optimized=False)

    def write(start, values, scale, zero):
        scale, zero = (jax.lax.broadcast_in_dim(number, (rows, columns), (1,)) for number in (scale, zero))
        half = 2 ** (bits - 1)
        codes = jnp.clip(jnp.round(scale * values.astype(jnp.float32) - zero), -half, half - 1)
        plgpu.store(y_ref.at[place(start)], ((codes + zero) / scale).astype(dtype), optimized=False)

    def scale_and_zero_point(low, high):
        low, high = (jnp.min(low, axis=0).astype(jnp.float32), jnp.max(high, axis=0).astype(jnp.float32))
        scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
        return scale, jnp.round(scale * low) + 2 ** (bits - 1)

    last = [pixels - rows] if rest else []
    if pixels * columns <= _MAX_ELEMENTS * _THREADS:
        starts = [*range(0, loops * rows, rows), *last]
        held = [read(start) for start in starts]
        numbers = scale_and_zero_point(functools.reduce(jnp.minimum, held), functools.reduce(jnp.maximum, held))
        for start, values in zip(starts, held, strict=True):
            write(start, values, *numbers)
        return

    def widened(start, ranges):
        values = read(start)
        return jnp.minimum(ranges[0], values), jnp.maximum(ranges[1], values)

    ends = read(pixels - rows)  # whole tiles, too, may be looked at twice
    low, high = jax.lax.fori_loop(0, loops, lambda i, ranges: widened(i * rows, ranges), (ends, ends))
    numbers = scale_and_zero_point(low, high)
    for start in last:
        write(start, read(start), *numbers)

    @pl.loop(0, loops)
    def _(i):
        write(i * rows, read(i * rows), *numbers)
