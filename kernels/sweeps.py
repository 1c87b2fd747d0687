"""What the kernels do inside: sweep over a program's tiles for the ranges, then write what the codes make.

Written for Pallas' Triton backend, whose lowering has no rounding and whose minimum and maximum pass
over NaN on a GPU, though not in interpret mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE, triton
from granq_jax.kernels.tiles import Tiling


class Place(NamedTuple):
    """A tile of a program's block.

    Attributes:
      rows: its pixels.
      mask: which of its elements are in the array, ``None`` if all are.
    """

    rows: Any
    mask: jax.Array | None

    def load(self, ref: Any) -> jax.Array:
        """The tile of ``ref`` as float32, 0 outside of the array."""
        other = None if self.mask is None else jnp.zeros((), ref.dtype)
        return triton.load(ref.at[self.rows, :], mask=self.mask, other=other).astype(jnp.float32)

    def store(self, ref: Any, values: jax.Array) -> None:
        """Writes the tile to ``ref``."""
        triton.store(ref.at[self.rows, :], values.astype(ref.dtype), mask=self.mask)


class Block:
    """The block of channels of the program that makes this; not to be made inside of a loop.

    Attributes:
      tiling: its tiles.
      inside: which of its columns are channels of the array, (columns,); ``None`` if all are.
    """

    def __init__(self, tiling: Tiling):
        self.tiling = tiling
        first = triton.program_id(1) * tiling.columns
        self.inside = first + jnp.arange(tiling.columns) < tiling.channels if tiling.ragged else None

    def place(self, start: Any, rows: int) -> Place:
        """The tile of ``rows`` pixels from ``start`` on, which may reach past the end if it is not traced."""
        mask = None
        if isinstance(start, int) and start + rows > self.tiling.pixels:
            mask = self._everywhere((start + jnp.arange(rows) < self.tiling.pixels)[:, None], rows)
        if self.inside is not None:
            inside = self._everywhere(self.inside[None, :], rows)
            mask = inside if mask is None else mask & inside
        return Place(triton.ds(start, rows), mask)

    def load_pair(self, ref: Any) -> tuple[jax.Array, jax.Array]:
        """Both rows of a (2, channels) array, (columns,) each, of whose block ``tiling.pair_rows`` are the rows.

        They are loaded as one tile of an element a thread. Of fewer elements every thread would load all that
        it needs by itself, which beside bfloat16 activations is half as much again.
        """
        rows = self.tiling.pair_rows
        row = self._everywhere(jnp.arange(rows)[:, None], rows)
        mask = row < 2
        if self.inside is not None:
            mask &= self._everywhere(self.inside[None, :], rows)
        both = triton.load(ref.at[triton.ds(0, rows), :], mask=mask, other=0.0)
        first, second = (jnp.sum(jnp.where(row == i, both, 0.0), axis=0) for i in (0, 1))
        return first, second

    def store_numbers(self, ref: Any, values: jax.Array) -> None:
        """Writes one number a channel, (columns,)."""
        triton.store(ref, values, mask=self.inside)

    def _everywhere(self, values, rows):
        return jnp.broadcast_to(values, (rows, self.tiling.columns))

    def quantize(
        self,
        bits: int,
        read: Callable[[Place], jax.Array],
        write: Callable[[Place, jax.Array, jax.Array, jax.Array], None],
    ) -> tuple[jax.Array, jax.Array]:
        """Scales and zero points of the channels, and the codes of each tile.

        Tiles that fit in registers are read once. Others are read twice, the second time in reverse, so that
        what the cache is most likely to hold still is read first.

        Args:
          bits: 2 to 8.
          read: gives the float32 values of a tile.
          write: takes a tile's place, its codes (float32), and scales and zero points, (1, columns).

        Returns:
          Scales and zero points, (columns,).
        """
        loops, rows = self.tiling.loops, self.tiling.rows
        ends = [self.place(start, rows) for start, rows in self.tiling.tiles]
        zeros = jnp.zeros((self.tiling.columns,), jnp.float32)
        ranges = (zeros + jnp.inf, zeros - jnp.inf, zeros)

        if not loops:
            held = [(place, read(place)) for place in ends]
            for place, values in held:
                ranges = _widened(ranges, values, place.mask)
            scale, zero = _scale_and_zero_point(ranges, bits)
            for place, values in held:
                write(place, _codes(values, scale, zero, bits), scale[None, :], zero[None, :])
            return scale, zero

        def widened_by(place, ranges):
            return _widened(ranges, read(place), place.mask)

        ranges = jax.lax.fori_loop(0, loops, lambda i, ranges: widened_by(self.place(i * rows, rows), ranges), ranges)
        for place in ends:
            ranges = widened_by(place, ranges)
        scale, zero = _scale_and_zero_point(ranges, bits)

        def read_again(place):
            write(place, _codes(read(place), scale, zero, bits), scale[None, :], zero[None, :])

        for place in reversed(ends):
            read_again(place)
        jax.lax.fori_loop(0, loops, lambda i, _: read_again(self.place((loops - 1 - i) * rows, rows)), None)
        return scale, zero


def round_half_to_even(v: jax.Array) -> jax.Array:
    """``jnp.round``, made of what Triton's lowering has."""
    below = jnp.floor(v)
    rest = v - below
    odd = below != 2 * jnp.floor(below / 2)
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), jnp.float32(1), jnp.float32(0))


def _widened(ranges, values, mask):
    low, high, nan = ranges

    def inside(outside):
        return values if mask is None else jnp.where(mask, values, outside)

    low = jnp.minimum(low, jnp.min(inside(jnp.inf), axis=0))
    high = jnp.maximum(high, jnp.max(inside(-jnp.inf), axis=0))
    nan = jnp.maximum(nan, jnp.max(jnp.where(values != values, jnp.float32(1), jnp.float32(0)), axis=0))
    return low, high, nan


def _scale_and_zero_point(ranges, bits):
    low, high, nan = ranges
    scale = (2**bits - 1) / jnp.maximum(high - low, MIN_RANGE)
    zero = round_half_to_even(scale * low) + 2 ** (bits - 1)
    return jnp.where(nan > 0, jnp.nan, scale), zero


def _codes(values, scale, zero, bits):
    half = 2 ** (bits - 1)
    return jnp.clip(round_half_to_even(scale[None, :] * values - zero[None, :]), -half, half - 1)
