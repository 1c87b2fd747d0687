"""What the kernels do inside: take the ranges of a program's tiles, then write what the codes make.

Written for Pallas' Triton backend, whose lowering has no rounding and whose minimum and maximum pass
over NaN on a GPU, though not in interpret mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from granq_jax.kernels import MIN_RANGE, triton
from granq_jax.kernels.lowered import give_way_unless
from granq_jax.kernels.tiles import Tiling, faster, power_of_two_above
from granq_jax.kernels.triton import BlockSpec, launch

RANGES_NAME = "ranges_of_parts"
_NO_FRACTION = 1.5 * 2.0**23  # a float32 of this size has none: what is added to it is rounded, half to even
Ranges = tuple[jax.Array, jax.Array]


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


class Codes(NamedTuple):
    """A tile's codes.

    Attributes:
      shifted: float32, the codes plus ``shift``.
      shift: (1, columns), a number that has no fraction; NaN where all values of a channel are to be.
      zero: zero points, (1, columns).
      step: units per code, (1, columns).
    """

    shifted: jax.Array
    shift: jax.Array
    zero: jax.Array
    step: jax.Array

    @property
    def integers(self) -> jax.Array:
        """Int8: the lowest byte of what the number's fraction holds."""
        return jax.lax.bitcast_convert_type(self.shifted, jnp.int32).astype(jnp.int8)

    @property
    def values(self) -> jax.Array:
        """What the codes stand for."""
        return (self.shifted - self.shift + self.zero) * self.step


class Block:
    """The block of channels, and the part of their maps, of the program that makes this.

    Not to be made inside of a loop.

    Attributes:
      tiling: its tiles.
      inside: which of its columns are channels of the array, (columns,); ``None`` if all are.
      end: how many pixels there are from the block's first on, past the block's end perhaps.
    """

    def __init__(self, tiling: Tiling, part: Any = 0):
        self.tiling = tiling
        first = triton.program_id(0) * tiling.columns
        self.inside = first + jnp.arange(tiling.columns) < tiling.channels if tiling.ragged else None
        self.end = tiling.pixels - part * tiling.rows

    def place(self, tile: Any) -> Place:
        """The tile of this number."""
        tiling, mask = self.tiling, None
        rows, start = tiling.tile_rows, tile * tiling.tile_rows
        # Where it ends in the last part; one that a loop visits may be the part's last.
        end = (tiling.parts - 1) * tiling.rows + (start + rows if isinstance(tile, int) else tiling.rows)
        if end > tiling.pixels:
            mask = self._everywhere((start + jnp.arange(rows) < self.end)[:, None])
        if self.inside is not None:
            inside = self._everywhere(self.inside[None, :])
            mask = inside if mask is None else mask & inside
        return Place(triton.ds(start, rows), mask)

    def load_row(self, ref: Any, row: int) -> jax.Array:
        """A row of a (rows, columns) block, (1, columns)."""
        mask = None if self.inside is None else self.inside[None, :]
        other = None if mask is None else jnp.zeros((), ref.dtype)
        return triton.load(ref.at[triton.ds(row, 1), :], mask=mask, other=other)

    def store_numbers(self, ref: Any, values: jax.Array) -> None:
        """Writes one number a channel, (columns,)."""
        triton.store(ref, values, mask=self.inside)

    def _everywhere(self, values):
        return jnp.broadcast_to(values, (self.tiling.tile_rows, self.tiling.columns))

    def sweep(self, visit: Callable[[list[Place], Any], Any], carry: Any) -> Any:
        """Calls ``visit`` with some tiles and what it returned last, until all were visited."""
        together, loops, tiles = self.tiling.together, self.tiling.loops, self.tiling.tiles

        def some(i, carry):
            return visit([self.place(i * together + tile) for tile in range(together)], carry)

        carry = jax.lax.fori_loop(0, loops, some, carry) if loops else carry
        return visit([self.place(tile) for tile in range(loops * together, tiles)], carry)

    def widened(self, place: Place, values: jax.Array, ranges: Ranges) -> Ranges:
        """The least and greatest value at each place of a tile, with one tile more; NaN counts as infinity."""
        low, high = ranges
        values = jnp.where(values != values, jnp.inf, values)
        below, above = values, values
        if place.mask is not None:
            below, above = jnp.where(place.mask, values, jnp.inf), jnp.where(place.mask, values, -jnp.inf)
        return jnp.minimum(low, below), jnp.maximum(high, above)

    def no_ranges(self) -> Ranges:
        """Those of nothing, at each place of a tile."""
        everywhere = jnp.zeros((self.tiling.tile_rows, self.tiling.columns), jnp.float32)
        return everywhere + jnp.inf, everywhere - jnp.inf

    def load_ranges(self, refs: Sequence[Any]) -> Ranges:
        """Those of all parts of the maps, a row for each."""
        rows = power_of_two_above(self.tiling.parts)
        mask = jnp.broadcast_to((jnp.arange(rows) < self.tiling.parts)[:, None], (rows, self.tiling.columns))
        if self.inside is not None:
            mask &= jnp.broadcast_to(self.inside[None, :], mask.shape)
        low, high = (
            triton.load(ref.at[triton.ds(0, rows), :], mask=mask, other=jnp.float32(outside))
            for ref, outside in zip(refs, (jnp.inf, -jnp.inf), strict=True)
        )
        return low, high


class Quantizer:
    """What quantizes the channels of a block.

    Attributes:
      scale: codes per unit, (columns,); NaN where a channel holds NaN or infinity.
      zero: zero points, (columns,).
    """

    def __init__(self, ranges: Ranges, bits: int):
        low, high = ranges
        width, levels = jnp.maximum(high - low, MIN_RANGE), 2**bits - 1
        self._half, self._step = 2 ** (bits - 1), width * (1 / levels)
        # Not a constant, with which XLA would put together what is added and what is taken away again.
        self._shift = jnp.where(high < jnp.inf, jnp.float32(_NO_FRACTION), jnp.nan)
        self.scale = jnp.where(high < jnp.inf, levels / width, jnp.nan)
        self.zero = round_half_to_even(self.scale * low) + self._half

    def codes(self, values: jax.Array) -> Codes:
        """The codes of a tile."""
        shift, zero, step = self._shift[None, :], self.zero[None, :], self._step[None, :]
        # To clip first is the same, for the bounds are whole, and leaves nothing that is too large to be rounded so.
        clipped = jnp.clip(self.scale[None, :] * values - zero, -self._half, self._half - 1)
        return Codes(clipped + shift, shift, zero, step)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be quantized, and how: what the launches have in common.

    Attributes:
      name: of the kernel, in programs and profiles.
      tiling: of the arrays.
      bits: 2 to 8.
      maps: how many arrays (N, pixels, channels) there are.
      before: takes a tile of each and rows of numbers a channel, (1, columns), and gives what is quantized.
      integers: whether int8 codes are written, with scales and zero points, and not values.
    """

    name: str
    tiling: Tiling
    bits: int
    maps: int
    before: Callable[[list[jax.Array], list[jax.Array]], jax.Array]
    integers: bool = False

    def read(self, block: Block, refs: Sequence[Any]) -> Callable[[list[Place]], list[jax.Array]]:
        """A function of places that gives the values there; it loads all of them before it computes."""
        rows = [block.load_row(ref, i) for ref in refs[self.maps :] for i in range(ref.shape[0])]

        def values(places):
            tiles = [[place.load(ref) for ref in refs[: self.maps]] for place in places]
            return [self.before(of_place, rows) for of_place in tiles]

        return values


def quantized(task: Task, maps: Sequence[jax.Array], rows: Sequence[jax.Array], *, interpret: bool) -> Any:
    """Launches what quantizes arrays.

    Args:
      task: how.
      maps: ``task.maps`` arrays (N, pixels, channels), of one dtype.
      rows: float32 arrays (rows, channels).
      interpret: run by Pallas' interpreter, on any platform, instead of compiled for a GPU.

    Returns:
      An array (N, pixels, channels) of that dtype, or int8, and scales and zero points, (N, channels) float32.
    """
    tiling = task.tiling
    samples, pixels, channels = maps[0].shape
    give_way_unless(faster(task.name, pixels, maps[0].dtype.itemsize))
    row_specs = [BlockSpec((array.shape[0], tiling.columns), lambda block, part, n: (0, block)) for array in rows]
    grid = tiling.blocks, tiling.parts, samples  # the first of them in turn first: blocks share the lines of memory
    map_shape = (None, tiling.padded_pixels, tiling.columns)

    def start(kernel, name, in_specs, out_specs, out_shape, *arrays):
        return launch(
            partial(kernel, task=task),
            name=name,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            warps=tiling.warps,
            interpret=interpret,
        )(*arrays)

    ranges, range_specs = [], []
    if tiling.rows:
        part_specs = [BlockSpec(map_shape, lambda block, part, n: (n, part, block))] * task.maps
        number = BlockSpec((None, None, tiling.columns), lambda block, part, n: (n, part, block))
        by_part = jax.ShapeDtypeStruct((samples, tiling.parts, channels), jnp.float32)
        ranges = start(_ranges, RANGES_NAME, part_specs + row_specs, (number,) * 2, (by_part,) * 2, *maps, *rows)
        all_parts = (None, power_of_two_above(tiling.parts), tiling.columns)
        range_specs = [BlockSpec(all_parts, lambda block, part, n: (samples - 1 - n, 0, block))] * 2

    # Backwards, so that what was read last, which the cache holds still, is read first.
    back = BlockSpec(map_shape, lambda block, part, n: (samples - 1 - n, tiling.parts - 1 - part, block))
    numbers = BlockSpec((None, tiling.columns), lambda block, part, n: (samples - 1 - n, block))
    out = jax.ShapeDtypeStruct(maps[0].shape, jnp.int8 if task.integers else maps[0].dtype)
    by_channel = jax.ShapeDtypeStruct((samples, channels), jnp.float32)
    return start(
        _quantize,
        task.name,
        [back] * task.maps + row_specs + range_specs,
        (back, numbers, numbers) if task.integers else back,
        (out, by_channel, by_channel) if task.integers else out,
        *maps,
        *rows,
        *ranges,
    )


def _ranges(*refs, task):
    *in_refs, low_ref, high_ref = refs
    block = Block(task.tiling, triton.program_id(1))
    read = task.read(block, in_refs)

    def visit(places, ranges):
        for place, values in zip(places, read(places), strict=True):
            ranges = block.widened(place, values, ranges)
        return ranges

    low, high = _of_channels(block.sweep(visit, block.no_ranges()))
    block.store_numbers(low_ref, low)
    block.store_numbers(high_ref, high)


def _quantize(*refs, task):
    tiling = task.tiling
    out_refs = refs[-3:] if task.integers else refs[-1:]
    in_refs = refs[: len(refs) - len(out_refs)]
    range_refs = in_refs[-2:] if tiling.rows else ()
    block = Block(tiling, tiling.parts - 1 - triton.program_id(1))
    read = task.read(block, in_refs[: len(in_refs) - len(range_refs)])

    def write(places, values, quantizer):
        for place, of_place in zip(places, values, strict=True):
            codes = quantizer.codes(of_place)
            place.store(out_refs[0], codes.integers if task.integers else codes.values)

    if tiling.loops:
        quantizer = Quantizer(_of_channels(block.load_ranges(range_refs)), task.bits)
        block.sweep(lambda places, _: write(places, read(places), quantizer), None)
    else:  # all is loaded before anything is waited for
        places = [block.place(tile) for tile in range(tiling.tiles)]
        values, ranges = read(places), block.no_ranges()
        if tiling.rows:
            ranges = block.load_ranges(range_refs)
        else:
            for place, of_place in zip(places, values, strict=True):
                ranges = block.widened(place, of_place, ranges)
        quantizer = Quantizer(_of_channels(ranges), task.bits)
        write(places, values, quantizer)
    for ref, numbers in zip(out_refs[1:], (quantizer.scale, quantizer.zero), strict=False):
        block.store_numbers(ref, numbers)


def _of_channels(ranges):
    return jnp.min(ranges[0], axis=0), jnp.max(ranges[1], axis=0)


def round_half_to_even(v: jax.Array) -> jax.Array:
    """``jnp.round`` of numbers of any size, made of what Triton's lowering has."""
    below = jnp.floor(v)
    rest = v - below
    odd = below != 2 * jnp.floor(below / 2)
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), jnp.float32(1), jnp.float32(0))
