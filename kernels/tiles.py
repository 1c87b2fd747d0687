"""How the kernels cut an array (N, pixels, channels) into tiles: one program a sample and a block of channels.

Triton's tiles have powers of two as sizes, images have not: 7 x 7 pixels in a tile of 64 would ask the
memory for a third more than there is. So the pixels of a block are cut into several tiles, 32 + 16 + 1 of 49,
and a block of channels divides the channels wherever a power of two does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import platformdirs

VECTOR_BYTES = 16  # the widest load of one thread
SECTOR_BYTES = 32  # what a GPU fetches at least
WARP = 32
MAX_WARPS = 16
MAX_THREADS = WARP * MAX_WARPS
# A program that holds more elements than this, 64 a thread, spills registers.
MAX_ELEMENTS = 64 * MAX_THREADS
# So many elements are enough for a program to keep its share of the memory's bandwidth busy ...
AIM_ELEMENTS = MAX_ELEMENTS // 2
# ... and so many programs to give each multiprocessor of a large GPU one.
AIM_PROGRAMS = 128
ELEMENTS_A_THREAD = 32
ELEMENTS_A_THREAD_LOOPED = 16
# A remainder is read with a mask, not in ever smaller tiles, where that costs no more than this share.
NEGLIGIBLE = 1 / 64

TUNED_FILE = "tiles.json"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of one program.

    Attributes:
      pixels: of a channel map.
      channels: of the array.
      columns: channels of a block, a power of two.
      warps: of 32 threads each.
      rows: pixels of a tile in the loops of the two-sweep form; 0 where all tiles are held in registers, and
        memory is read once.
    """

    pixels: int
    channels: int
    columns: int
    warps: int
    rows: int = 0

    @property
    def threads(self) -> int:
        """Of a program."""
        return WARP * self.warps

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.columns)

    @property
    def ragged(self) -> bool:
        """Whether the last block is wider than what is left of the channels."""
        return self.channels % self.columns != 0

    @property
    def loops(self) -> int:
        """Tiles of ``rows`` pixels that a sweep loops over."""
        return self.pixels // self.rows if self.rows else 0

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """(first pixel, pixels) of the tiles that no loop covers; the last may reach past the end.

        Examples:
          >>> Tiling(pixels=49, channels=64, columns=64, warps=2).tiles
          ((0, 32), (32, 16), (48, 1))
        """
        return tuple(_powers_of_two(self.loops * self.rows, self.pixels))

    @property
    def padded_pixels(self) -> int:
        """Pixels up to the end of the last tile."""
        return sum(self.tiles[-1]) if self.tiles else self.pixels

    @property
    def pair_rows(self) -> int:
        """Rows of a block, of an element a thread, in which two numbers a channel lie."""
        return max(2, self.threads // self.columns)


def _powers_of_two(start: int, end: int) -> Iterator[tuple[int, int]]:
    negligible = int(end * NEGLIGIBLE)
    while start < end:
        left = end - start
        size = 1 << (left.bit_length() - 1)
        if size < left and 2 * size - left <= negligible:
            size *= 2
        yield start, size
        start += size


def tiling(samples: int, pixels: int, channels: int, itemsize: int, written_itemsize: int | None = None) -> Tiling:
    """The tiles for an array (samples, pixels, channels) of ``itemsize`` bytes an element.

    What was tuned for this machine's GPU (:func:`tuned`) comes first. Otherwise, and this is the whole table:

    - channels of a block: as many as a power of two divides, halved while a program would hold more than
      ``AIM_ELEMENTS`` or the programs are fewer than ``AIM_PROGRAMS``, but no fewer than fill a sector of memory
      and a vector of what is written;
    - fewer, if a channel map fits in registers only so (``MAX_ELEMENTS``), down to a vector;
    - else two sweeps;
    - threads: one for 32 to 63 elements, at most 512.

    Args:
      samples: N.
      pixels: of a channel map.
      channels: C.
      itemsize: of what is read.
      written_itemsize: of what is written, if it is another.

    Examples:
      >>> tiling(16, 7 * 7, 960, 4)
      Tiling(pixels=49, channels=960, columns=64, warps=2, rows=0)
      >>> tiling(16, 112 * 112, 64, 4)
      Tiling(pixels=12544, channels=64, columns=8, warps=16, rows=1024)
    """
    written = itemsize if written_itemsize is None else written_itemsize
    if found := tuned().get(f"{samples}x{pixels}x{channels}x{itemsize}x{written}"):
        return Tiling(pixels, channels, *found)
    vector = VECTOR_BYTES // itemsize
    dividing = channels & -channels
    columns = dividing if dividing >= min(vector, channels) else _power_of_two_above(channels)
    # Of fewer columns, the smallest of several tiles would leave threads of a warp with nothing to do.
    least = max(SECTOR_BYTES // itemsize, VECTOR_BYTES // written, WARP // (pixels & -pixels))
    while columns > least and (columns * pixels > AIM_ELEMENTS or samples * -(-channels // columns) < AIM_PROGRAMS):
        columns //= 2
    fitting = columns
    while fitting > vector and fitting * pixels > MAX_ELEMENTS:
        fitting //= 2
    if fitting * pixels > MAX_ELEMENTS:
        return Tiling(pixels, channels, columns, MAX_WARPS, rows=MAX_THREADS * ELEMENTS_A_THREAD_LOOPED // columns)
    threads = min(MAX_THREADS, max(WARP, fitting * pixels // ELEMENTS_A_THREAD))
    return Tiling(pixels, channels, fitting, warps=1 << ((threads // WARP).bit_length() - 1))


def _power_of_two_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def tuned() -> dict[str, list[int]]:
    """Choices of ``benchmarks/gpu_campaign.py --tune`` on this machine's GPU: (columns, warps, rows) by shape."""
    import jax

    path = tuned_path()
    if not path.is_file():
        return {}
    return json.loads(path.read_text()).get(jax.devices()[0].device_kind, {})


def tuned_path() -> Path:
    """Where tuned choices are kept."""
    return platformdirs.user_cache_path("granq-jax") / TUNED_FILE
