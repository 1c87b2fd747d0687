"""Tiles cover every element once, are powers of two, and are a vector for every thread."""

import json

import jax
import pytest
from granq_jax.kernels import codes, out_channel, sample_channel, tiles
from granq_jax.kernels.tiles import HELD_ELEMENTS, Tiling, tiling
from hypothesis import given
from hypothesis import strategies as st

from granq_jax import fake_quant
from granq_jax.quant.dispatch import KERNEL_DTYPES


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def assert_covers(found, pixels, channels):
    assert is_power_of_two(found.columns)
    assert is_power_of_two(found.warps)
    assert is_power_of_two(found.tile_rows)
    assert found.tile_rows * found.columns <= max(found.columns, found.threads * found.vector)
    assert (found.blocks - 1) * found.columns < channels <= found.blocks * found.columns
    of_a_part = found.rows or pixels
    assert found.padded_pixels - found.tile_rows < of_a_part <= found.padded_pixels
    assert (found.parts - 1) * of_a_part < pixels <= found.parts * of_a_part
    if found.rows:
        assert found.padded_pixels == found.rows
    assert 0 <= found.tiles - found.loops * found.together <= found.together
    assert not found.loops or found.together * found.vector <= tiles.UNROLLED
    assert (pixels - found.last_rows) % found.tile_rows == 0
    assert 1 <= found.last_rows <= found.tile_rows


@given(
    samples=st.integers(1, 300),
    pixels=st.integers(1, 60_000),
    channels=st.integers(1, 2100),
    itemsize=st.sampled_from([4, 2]),
    written=st.sampled_from([None, 1]),
)
def test_any_shape(samples, pixels, channels, itemsize, written):
    found = tiling(samples, pixels, channels, itemsize, written)
    assert_covers(found, pixels, channels)
    assert found.threads <= 512
    assert (found.rows > 0) == (pixels > tiles.HELD_PIXELS)
    if not found.rows:
        assert found.columns * itemsize <= tiles.MAX_ROW_BYTES
        assert pixels * found.columns <= HELD_ELEMENTS


@given(
    pixels=st.integers(1, 60_000),
    channels=st.integers(1, 300),
    columns=st.sampled_from([1, 4, 16, 128]),
    warps=st.sampled_from([1, 4, 32]),
    rows=st.integers(0, 5000),
    vector=st.sampled_from([4, 8]),
)
def test_any_choice(pixels, channels, columns, warps, rows, vector):
    """Also those that somebody may have tuned."""
    assert_covers(Tiling(pixels, channels, columns, warps, rows, vector), pixels, channels)


@pytest.mark.parametrize("pixels", [1024, 256, 64, 784, 196, 49])
@pytest.mark.parametrize("channels", [16, 24, 64, 144, 960, 2048])
@pytest.mark.parametrize("itemsize", [4, 2])
def test_images_smaller_than_56_pixels_are_read_once(pixels, channels, itemsize):
    found = tiling(16, pixels, channels, itemsize)
    assert found.parts == 1
    assert not found.rows
    assert not found.loops
    assert not found.ragged


@pytest.mark.parametrize("pixels", [3136, 12544, 2304, 4608])
def test_parts_of_the_networks_large_maps_are_whole_tiles(pixels):
    found = tiling(16, pixels, 64, 4)
    assert found.parts > 1
    assert pixels % found.rows == 0


@pytest.mark.parametrize(
    ("impl", "pixels", "there"), [("auto", 32 * 32, True), ("auto", 200 * 200, False), ("pallas", 200 * 200, True)]
)
def test_automatically_the_kernel_computes_where_it_is_known_to_be_faster(impl, pixels, there):
    x = jax.ShapeDtypeStruct((2, pixels, 16), jax.numpy.float32)
    traced = jax.jit(lambda x: fake_quant(x, bits=3, impl=impl)).trace(x)
    assert (sample_channel.NAME in traced.lower(lowering_platforms=("cuda",)).as_text()) == there


@pytest.mark.parametrize("kernel", [sample_channel.NAME, out_channel.NAME, codes.NAME])
def test_every_kernel_and_type_is_in_the_table_of_the_faster(kernel):
    for dtype in KERNEL_DTYPES:
        least, most = tiles.FASTER[kernel, jax.numpy.dtype(dtype).itemsize]
        assert least <= most + 1


def test_a_tuned_choice_comes_first(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({jax.devices()[0].device_kind: {"16x49x64x4x4": [32, 1, 0]}}))
    monkeypatch.setattr(tiles, "tuned_path", lambda: path)
    tiles.tuned.cache_clear()
    try:
        assert tiling(16, 49, 64, 4) == tiles.Tiling(pixels=49, channels=64, columns=32, warps=1)
        assert tiling(200, 49, 512, 4).columns == 32
        assert tiling(200, 49, 512, 4).warps > 1
    finally:
        tiles.tuned.cache_clear()
