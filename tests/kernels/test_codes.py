"""Codes in interpret mode against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import codes

from granq_jax.quant import dequantize, fake_quant, quantize_codes
from tests.kernels.levels import DTYPES, assert_same_levels, normal


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 7, 3), "float32"), ((1, 80, 80, 20), "bfloat16")])
def test_codes_scales_and_zero_points(shape, dtype):
    x = normal(shape, dtype)
    found, scale, zero = codes.quantize(x, 3, interpret=True)
    expected, expected_scale, expected_zero = codes.reference(x, 3)
    assert found.dtype == jnp.int8
    np.testing.assert_allclose(scale, expected_scale, rtol=3e-7)
    np.testing.assert_array_equal(zero, expected_zero)
    other = np.abs(found.astype(int) - expected.astype(int))
    assert other.max() <= 1
    assert other.sum() <= 1e-4 * other.size


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 8, 8, 16), (1, 5, 9, 144), (1, 130, 129, 5), (1, 192, 192, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_more_shapes(shape, dtype):
    test_codes_scales_and_zero_points(shape, dtype)


def test_a_channel_that_is_not_finite_has_no_scale():
    x = normal((2, 7, 7, 4))
    for i, bad in enumerate((jnp.nan, jnp.inf)):
        x = x.at[1, 3, 3, i].set(bad)
    codes_of_all, scale, _ = codes.quantize(x, 3, interpret=True)
    expected, expected_scale, _ = codes.reference(x, 3)
    assert np.isnan(scale[1, 0, 0, :2]).all()
    np.testing.assert_allclose(scale[..., 2:], expected_scale[..., 2:], rtol=3e-7)
    np.testing.assert_array_equal(codes_of_all[..., 2:], expected[..., 2:])


def test_codes_of_constant_channels_stand_for_their_value():
    x = jnp.broadcast_to(normal((3, 1, 1, 24)), (3, 2, 2, 24))
    q = quantize_codes(x, bits=3, impl="pallas_interpret")
    np.testing.assert_allclose(dequantize(q), x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("granularity", "shape"), [("sample_channel", (2, 5, 3, 6)), ("out_channel", (3, 3, 4, 6))])
def test_quantize_codes_is_the_same_by_kernel(granularity, shape):
    x = normal(shape)
    by_kernel = quantize_codes(x, bits=4, granularity=granularity, impl="pallas_interpret")
    by_xla = quantize_codes(x, bits=4, granularity=granularity, impl="xla")
    for ours, theirs in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(by_xla), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=1e-6)
    if granularity == "sample_channel":
        assert_same_levels(dequantize(by_kernel), fake_quant(x, bits=4, impl="xla"), x, 4)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_it_lowers_for_gpus(platform):
    x = jax.ShapeDtypeStruct((2, 7, 7, 24), jnp.bfloat16)
    traced = jax.jit(lambda x: quantize_codes(x, bits=3, impl="pallas")).trace(x)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert codes.NAME in lowered.as_text()
