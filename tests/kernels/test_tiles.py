"""Tiles cover every element once, are powers of two, and waste next to nothing."""

import json

import jax
import pytest
from granq_jax.kernels import tiles
from granq_jax.kernels.tiles import MAX_ELEMENTS, tiling
from hypothesis import given
from hypothesis import strategies as st


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@given(
    samples=st.integers(1, 300),
    pixels=st.integers(1, 60_000),
    channels=st.integers(1, 2100),
    itemsize=st.sampled_from([4, 2]),
    written=st.sampled_from([None, 1]),
)
def test_any_shape(samples, pixels, channels, itemsize, written):
    found = tiling(samples, pixels, channels, itemsize, written)
    assert is_power_of_two(found.columns)
    assert is_power_of_two(found.warps)
    assert found.threads <= 512
    covered = found.loops * found.rows
    for start, rows in found.tiles:
        assert start == covered
        assert is_power_of_two(rows)
        covered += rows
    assert pixels <= covered <= found.padded_pixels <= pixels * (1 + 1 / 64)
    assert (found.blocks - 1) * found.columns < channels <= found.blocks * found.columns
    if found.loops:
        assert is_power_of_two(found.rows)
        assert found.rows * found.columns <= MAX_ELEMENTS
    else:
        assert covered * found.columns <= MAX_ELEMENTS * (1 + 1 / 64)


@pytest.mark.parametrize("pixels", [1024, 256, 64, 3136, 784, 196, 49])
@pytest.mark.parametrize("channels", [16, 24, 64, 144, 960, 2048])
@pytest.mark.parametrize("itemsize", [4, 2])
def test_images_smaller_than_112_pixels_are_read_once(pixels, channels, itemsize):
    found = tiling(16, pixels, channels, itemsize)
    assert not found.loops
    assert not found.ragged
    assert found.padded_pixels == pixels


def test_a_tuned_choice_comes_first(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({jax.devices()[0].device_kind: {"16x49x64x4x4": [32, 1, 0]}}))
    monkeypatch.setattr(tiles, "tuned_path", lambda: path)
    tiles.tuned.cache_clear()
    try:
        assert tiling(16, 49, 64, 4) == tiles.Tiling(pixels=49, channels=64, columns=32, warps=1)
        assert tiling(16, 49, 512, 4).columns == 64
    finally:
        tiles.tuned.cache_clear()
