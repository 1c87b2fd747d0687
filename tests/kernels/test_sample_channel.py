"""The kernel in interpret mode against its reference and XLA's form, and its lowering for GPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import sample_channel
from hypothesis import given, settings
from hypothesis import strategies as st

from granq_jax import QuantSpec, create_model, fake_quant, quantize

SHAPES = [(2, 7, 7, 3), (3, 1, 1, 24), (2, 32, 32, 16), (1, 5, 9, 144), (1, 112, 112, 3), (1, 130, 129, 5)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same_levels(y, expected, x, bits):
    """Equal to rounding, but for a value near a tie, which may take the neighbouring level."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    rounding = 2 * float(jnp.finfo(y.dtype).eps)
    y, expected, x = (np.asarray(a, np.float32) for a in (y, expected, x))
    level = (x.max((1, 2), keepdims=True) - x.min((1, 2), keepdims=True)) / (2**bits - 1)
    difference = np.abs(y - expected) - rounding * np.abs(expected) - 1e-7
    assert (difference > 0).sum() <= max(1, difference.size // 1000)
    assert (difference <= 1.01 * level).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(shape, dtype):
    x = normal(shape, dtype)
    for bits in (2, 3, 8):
        y = fake_quant(x, bits=bits, impl="pallas_interpret")
        assert_same_levels(y, sample_channel.reference(x, bits), x, bits)
        assert_same_levels(y, fake_quant(x, bits=bits, impl="xla"), x, bits)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12)
def test_drawn_shapes(shape, bits, dtype, seed):
    x = normal(shape, dtype, seed)
    y = sample_channel.fake_quant(x, bits, interpret=True)
    expected = sample_channel.reference(x, bits)
    constant = np.asarray(jnp.max(x, (1, 2)) == jnp.min(x, (1, 2)))[:, None, None, :]
    assert_same_levels(jnp.where(constant, x, y), jnp.where(constant, x, expected), x, bits)
    np.testing.assert_allclose(
        np.where(constant, y, 0).astype(np.float32), np.where(constant, x, 0).astype(np.float32), rtol=1e-2, atol=1e-8
    )


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 130, 129, 4)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_spoils_its_own_channel_only(shape, bad):
    x = np.array(normal(shape, jnp.float32))
    x[..., 1] = 0.7
    clean = np.array(sample_channel.fake_quant(jnp.asarray(x), 3, interpret=True))
    np.testing.assert_allclose(clean[..., 1], 0.7, rtol=1e-6)
    x[0, -1, 0, 3] = bad
    y = np.array(sample_channel.fake_quant(jnp.asarray(x), 3, interpret=True))
    assert not np.isfinite(y[0, :, :, 3]).any()
    y[0, :, :, 3] = clean[0, :, :, 3]
    np.testing.assert_array_equal(y, clean)


def test_rounding_is_half_to_even():
    v = jnp.array([-2.5, -1.5, -0.5, -0.3, 0.5, 1.5, 2.5, 7.49, 2.0**22 + 0.5, 2.0**23 + 1, 7e8, -7e8])
    np.testing.assert_array_equal(sample_channel._round_half_to_even(v), jnp.round(v))


@pytest.mark.parametrize("impl", ["auto", "pallas_interpret"])
def test_gradients(impl):
    x, cotangent = normal((2, 5, 3, 6), jnp.float32), normal((2, 5, 3, 6), jnp.float32, 1)
    _, pull_back = jax.vjp(jax.jit(partial(fake_quant, bits=3, impl=impl)), x)
    np.testing.assert_array_equal(pull_back(cotangent)[0], cotangent)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 7, 3), (1, 130, 129, 5)])
def test_it_lowers_for_gpus(platform, dtype, shape):
    x = jax.ShapeDtypeStruct(shape, dtype)
    lowered = jax.jit(partial(fake_quant, bits=3)).trace(x).lower(lowering_platforms=(platform,))
    assert "triton" in lowered.as_text()


def test_auto_takes_the_kernel_for_gpus_only_and_only_where_it_applies():
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)

    def text(platform, **kwargs):
        traced = jax.jit(partial(fake_quant, bits=3, **kwargs)).trace(x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "triton" not in text("cpu")
    assert "triton" not in text("cuda", impl="xla")
    assert "triton" not in text("cuda", granularity="tensor")
    assert "triton" in text("cuda", impl="pallas")


def test_tiles_fit_and_are_powers_of_two():
    for pixels in (1, 49, 64, 196, 784, 1024, 3136, 12544, 50176):
        for channels in (1, 3, 16, 24, 64, 144, 960, 2048):
            rows, columns = sample_channel.tile_shape(pixels, channels)
            assert rows * columns <= sample_channel.TILE_ELEMENTS
            assert rows & (rows - 1) == columns & (columns - 1) == 0


def test_a_student_is_the_same_with_the_kernel():
    model = create_model("resnet8_digits")
    images = normal((4, 8, 8, 1), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    by_xla, by_kernel = (
        jax.jit(quantize(model, QuantSpec(), impl=impl).apply)(variables, images)
        for impl in ("xla", "pallas_interpret")
    )
    np.testing.assert_allclose(by_kernel, by_xla, rtol=0.1, atol=0.1)  # a flipped level carries on
