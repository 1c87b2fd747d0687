"""How the kernels cut an array (N, pixels, channels): a program takes a sample, a block of channels and perhaps a part.

All tiles of a program are of one size, a vector of 16 bytes a thread: what every thread loads is then a piece of its
warp's piece, however wide the types are that are read and written. The last tile of a map is masked where it reaches
past the end, and no memory is asked for what is masked.

A program holds its channel maps in registers and reads memory once, where rows of a sector allow so. Of larger maps one
launch takes the ranges of parts and a second one quantizes: programs that sweep over whole maps are too few to be fast.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import platformdirs

VECTOR_BYTES = 16  # the widest load of one thread
WARP = 32

# The table of choices, as they were measured on an H200 (results/gpu/tiles.csv).
MAX_ROW_BYTES = 128  # of a pixel's channels in a block that is held
# Blocks are halved while the programs are fewer than the first of these, down to AIM_COLUMNS; while they are fewer than
# the second, down to MIN_ROW_BYTES; while they are fewer than the third, down to a vector.
AIM_PROGRAMS = (256, 128, 64)
AIM_COLUMNS = 16
MIN_ROW_BYTES = 32  # what a GPU fetches at least
HELD_PIXELS = 2048  # of maps that are not cut into parts
HELD_ELEMENTS = 16 * 1024  # that a program may hold ...
HELD_A_THREAD = 16  # ... and how many of them each thread should ...
FEW_A_THREAD = 32  # ... or where programs are fewer still: threads wait for one another less
HELD_WARPS = 16
SPLIT_COLUMNS = 64
SPLIT_WARPS = 8
SPLIT_PIXELS = 4.0  # a part has this times the square root of a map's pixels: its range is read again for each part
SPLIT_PROGRAMS = 96  # so many there should be, if need be by more parts
UNROLLED = 32  # elements of a part that a thread holds at a time

# Where a kernel beats XLA's form: from and up to how many pixels of a map, by kernel and bytes an element that is read.
# Elsewhere XLA's form needs but one launch (few pixels), or reads as often and as fast (many). Measured on an H200, but
# for codes of bfloat16 and weights in it, which are taken as those of float32.
FASTER = {
    ("fake_quant_sample_channel", 4): (16, 4096),
    ("fake_quant_sample_channel", 2): (16, 16384),
    ("quantize_sample_channel", 4): (16, 16384),
    ("quantize_sample_channel", 2): (16, 16384),
    ("fake_quant_out_channel", 4): (16, 8192),
    ("fake_quant_out_channel", 2): (16, 8192),
}

TUNED_FILE = "tiles.json"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of one program.

    Attributes:
      pixels: of a channel map.
      channels: of the array.
      columns: channels of a block, a power of two.
      warps: of 32 threads each.
      rows: pixels of a part of a map, where one launch takes the ranges of parts and another quantizes; 0 where a
        program holds whole maps.
      vector: elements of a thread in a tile, a power of two.
    """

    pixels: int
    channels: int
    columns: int
    warps: int
    rows: int = 0
    vector: int = 4

    @property
    def threads(self) -> int:
        """Of a program."""
        return WARP * self.warps

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.columns)

    @property
    def parts(self) -> int:
        """Parts of a map."""
        return -(-self.pixels // self.rows) if self.rows else 1

    @property
    def ragged(self) -> bool:
        """Whether the last block is wider than what is left of the channels."""
        return self.channels % self.columns != 0

    @property
    def tile_rows(self) -> int:
        """Pixels of a tile, a power of two.

        Examples:
          >>> Tiling(pixels=49, channels=64, columns=64, warps=4).tile_rows
          8
        """
        most = self.rows & -self.rows if self.rows else power_of_two_above(self.pixels)
        return min(most, max(1, self.threads * self.vector // self.columns))

    @property
    def tiles(self) -> int:
        """Tiles of a program.

        Examples:
          >>> Tiling(pixels=49, channels=64, columns=64, warps=4).tiles
          7
        """
        return -(-(self.rows or self.pixels) // self.tile_rows)

    @property
    def last_rows(self) -> int:
        """Pixels in the last tile of the last part."""
        return (self.pixels - 1) % self.tile_rows + 1

    @property
    def together(self) -> int:
        """Tiles that a program holds at a time: all, or of a part what ``UNROLLED`` allows."""
        most = max(1, UNROLLED // self.vector) if self.rows else self.tiles
        return -(-self.tiles // -(-self.tiles // most))

    @property
    def loops(self) -> int:
        """Rounds of a loop over so many tiles, where there are more; what is left follows it."""
        return self.tiles // self.together if self.together < self.tiles else 0

    @property
    def padded_pixels(self) -> int:
        """Pixels of a program up to the end of its last tile."""
        return self.tiles * self.tile_rows


def tiling(samples: int, pixels: int, channels: int, itemsize: int, written_itemsize: int | None = None) -> Tiling:
    """The tiles for an array (samples, pixels, channels) of ``itemsize`` bytes an element.

    What was tuned for this machine's GPU (:func:`tuned`) comes first. Otherwise, by the constants of this module:

    - channels of a block: as many as a power of two divides and ``MAX_ROW_BYTES`` hold, halved as
      ``AIM_PROGRAMS`` says, and while they are more than ``HELD_ELEMENTS``;
    - threads: one for ``HELD_A_THREAD`` or ``FEW_A_THREAD`` elements, at most ``HELD_WARPS`` warps;
    - maps of more than ``HELD_PIXELS`` in parts: ``SPLIT_COLUMNS``, ``SPLIT_WARPS``, ``SPLIT_PIXELS * sqrt(pixels)``
      pixels, halved while the programs are fewer than ``SPLIT_PROGRAMS``; a little more or less for whole parts.

    Args:
      samples: N.
      pixels: of a channel map.
      channels: C.
      itemsize: of what is read.
      written_itemsize: of what is written, if it is another.

    Examples:
      >>> tiling(16, 7 * 7, 960, 4)
      Tiling(pixels=49, channels=960, columns=32, warps=4, rows=0, vector=4)
      >>> tiling(16, 112 * 112, 64, 4)
      Tiling(pixels=12544, channels=64, columns=64, warps=8, rows=448, vector=4)
    """
    written = itemsize if written_itemsize is None else written_itemsize
    vector = VECTOR_BYTES // itemsize
    if found := tuned().get(f"{samples}x{pixels}x{channels}x{itemsize}x{written}"):
        return Tiling(pixels, channels, *found, vector=vector)
    dividing = channels & -channels
    widest = dividing if dividing >= min(vector, channels) else power_of_two_above(channels)

    def programs(columns):
        return samples * -(-channels // columns)

    if pixels > HELD_PIXELS:
        columns = min(widest, SPLIT_COLUMNS)
        tile = WARP * SPLIT_WARPS * vector // columns
        parts = max(1, round(math.sqrt(pixels) / SPLIT_PIXELS))
        while parts * programs(columns) < SPLIT_PROGRAMS and 2 * parts * tile <= pixels:
            parts *= 2
        near = range(max(1, parts * 3 // 4), parts * 5 // 4 + 1)
        parts = min(near, key=lambda n: (pixels % (n * tile) > 0, abs(n - parts)))
        return Tiling(pixels, channels, columns, SPLIT_WARPS, rows=-(-pixels // (parts * tile)) * tile, vector=vector)

    columns = min(widest, MAX_ROW_BYTES // itemsize)
    for least, enough in zip((AIM_COLUMNS, MIN_ROW_BYTES // itemsize, vector), AIM_PROGRAMS, strict=True):
        while columns > least and (columns * pixels > HELD_ELEMENTS or programs(columns) < enough):
            columns //= 2
    a_thread = FEW_A_THREAD if programs(columns) < AIM_PROGRAMS[-1] else HELD_A_THREAD
    threads = min(WARP * HELD_WARPS, max(WARP, power_of_two_above(columns * pixels // a_thread)))
    return Tiling(pixels, channels, columns, threads // WARP, vector=vector)


def faster(kernel: str, pixels: int, itemsize: int) -> bool:
    """Whether a kernel beats XLA's form: what ``impl="auto"`` goes by, and ``"pallas"`` does not.

    Args:
      kernel: its name.
      pixels: of a channel map.
      itemsize: bytes an element of what is read.

    Examples:
      >>> faster("fake_quant_sample_channel", 32 * 32, 4), faster("fake_quant_out_channel", 3 * 3 * 1, 4)
      (True, False)
    """
    least, most = FASTER[kernel, itemsize]
    return least <= pixels <= most


def power_of_two_above(n: int) -> int:
    """The least power of two that is no less than ``n``."""
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
