import re
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granq_jax import dequantize, fake_quant, quantize_codes
from granq_jax.quant.spec import ACT_GRANULARITIES, GRANULARITIES
from tests.conftest import one_line_error
from tests.golden_figures import CIFAR, hwio, nhwc
from tests.quant import reference

BITS = (2, 3, 4, 5, 8)
SHAPES = ((2, 7, 7, 3), (1, 1, 1, 5), (3, 5, 4), (4, 9), (2, 3, 3, 24), (2, 2, 3, 2, 3))


def golden(tensor):
    """(input, granularity, {bits: output}) in the package's layout."""
    x = CIFAR[f"fq/{tensor}/x"]
    layout, granularity = {
        "act": (nhwc, "sample_channel"),
        "signed_act": (nhwc, "sample_channel"),
        "conv3x3": (hwio, "kernel"),
        "conv1x1": (hwio, "kernel"),
        "fc": (jnp.asarray, "sample_channel"),
    }[tensor]
    return layout(x), granularity, {bits: layout(CIFAR[f"fq/{tensor}/{bits}bit"]) for bits in BITS}


@pytest.mark.parametrize("tensor", ["act", "signed_act", "conv3x3", "conv1x1", "fc"])
def test_golden_values(x64, tensor):
    x, granularity, outputs = golden(tensor)
    for bits, expected in outputs.items():
        y = fake_quant(x, bits=bits, granularity=granularity)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


def test_a_linear_layer_in_flax_layout_has_the_same_ranges_as_in_pytorch_layout(x64):
    x, _, outputs = golden("fc")
    for granularity in ("kernel", "out_channel"):
        np.testing.assert_allclose(fake_quant(x.T, bits=3, granularity=granularity).T, outputs[3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tensor", ["act", "signed_act", "conv3x3", "fc"])
def test_float32_codes_agree_with_float64(x64, tensor):
    x, granularity, _ = golden(tensor)
    same = total = 0
    for bits in BITS:
        exact = quantize_codes(x, bits=bits, granularity=granularity)
        single = quantize_codes(x.astype(jnp.float32), bits=bits, granularity=granularity)
        # A constant group's zero point has no digits left for a code; its values are tested below.
        counted = jnp.broadcast_to(exact.scale < 1e6, x.shape)
        same += int(jnp.sum((exact.codes == single.codes) & counted))
        total += int(jnp.sum(counted))
        np.testing.assert_allclose(
            dequantize(single)[~counted], np.asarray(x)[~np.asarray(counted)], rtol=1e-6, atol=1e-8
        )
    assert same / total >= 0.999


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_naive_reference(x64, shape, granularity):
    x = np.random.default_rng(sum(shape)).standard_normal(shape)
    for bits in (2, 3, 8):
        codes, values = reference.fake_quant(x, bits, granularity)
        q = quantize_codes(x, bits=bits, granularity=granularity)
        np.testing.assert_array_equal(q.codes, codes)
        np.testing.assert_allclose(fake_quant(x, bits=bits, granularity=granularity), values, rtol=1e-12, atol=1e-14)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@settings(max_examples=25)
def test_properties(seed, shape, bits, granularity, magnitude, dtype):
    magnitude = min(magnitude, 1e3) if dtype == jnp.float16 else magnitude
    x = jnp.asarray(magnitude * np.random.default_rng(seed).standard_normal(shape), dtype)
    y = fake_quant(x, bits=bits, granularity=granularity)
    assert y.dtype == x.dtype
    assert y.shape == x.shape

    q = quantize_codes(x, bits=bits, granularity=granularity)
    chex.assert_type(q.codes, jnp.int8)
    assert q.scale.ndim == x.ndim
    assert q.scale.shape == q.zero_point.shape
    assert int(jnp.min(q.codes)) >= -(2 ** (bits - 1))
    assert int(jnp.max(q.codes)) <= 2 ** (bits - 1) - 1
    # Two programs may differ in the last bit: XLA may divide, or multiply by the reciprocal.
    last_bit = 2 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(dequantize(q).astype(dtype), y, rtol=last_bit, atol=0)

    # Half a level, half a level more for the rounded zero point, and rounding of the output.
    error = jnp.abs(y.astype(jnp.float32) - x.astype(jnp.float32))
    slack = last_bit * jnp.abs(x.astype(jnp.float32)) + 1e-6 * magnitude
    assert bool(jnp.all(error <= 1.01 / q.scale + slack))

    in_order = jnp.argsort(x.ravel())
    if granularity == "tensor":
        assert bool(jnp.all(jnp.diff(y.ravel()[in_order].astype(jnp.float32)) >= 0))


def test_at_most_two_to_the_bits_levels_even_on_ties(x64):
    x = jnp.linspace(-0.5, 3.5, 9).reshape(1, 9, 1)  # scale 7/4: many values at x.5
    for bits in BITS:
        assert len(np.unique(fake_quant(x, bits=bits))) <= 2**bits


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-3, 250.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_constant_channel_stays_what_it_is(value, dtype):
    x = jnp.full((2, 4, 4, 3), value, dtype)
    np.testing.assert_allclose(
        fake_quant(x, bits=3).astype(jnp.float32), x.astype(jnp.float32), rtol=float(jnp.finfo(dtype).eps), atol=1e-8
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_spoils_its_own_group_only(bad):
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 4)).astype(np.float32)
    clean = np.array(fake_quant(x, bits=3))
    x[1, 2, 0, 3] = bad
    y = np.array(fake_quant(x, bits=3))
    assert not np.isfinite(y[1, :, :, 3]).any()
    y[1, :, :, 3] = clean[1, :, :, 3]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_gradient_is_straight_through(granularity):
    rng = np.random.default_rng(1)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 3, 3, 4)), jnp.float32) for _ in range(2))
    _, pull_back = jax.vjp(partial(fake_quant, bits=3, granularity=granularity), x)
    np.testing.assert_array_equal(pull_back(cotangent)[0], cotangent)
    per_sample = jax.vmap(jax.grad(lambda row: jnp.sum(fake_quant(row, bits=2) ** 2)))(x)
    np.testing.assert_allclose(per_sample, 2 * jax.vmap(lambda row: fake_quant(row, bits=2))(x), rtol=1e-6)


def written_with_keepdims(x, bits):
    """The same arithmetic, vectorized by hand."""
    half = 2 ** (bits - 1)
    low, high = jnp.min(x, (1, 2), keepdims=True), jnp.max(x, (1, 2), keepdims=True)
    scale = (2**bits - 1) / jnp.maximum(high - low, 1e-8)
    zero = jnp.round(scale * low) + half
    return (jnp.clip(jnp.round(scale * x - zero), -half, half - 1) + zero) / scale


def test_the_vmapped_form_compiles_to_the_code_of_the_handwritten_one():
    x = jnp.ones((4, 8, 8, 16))

    def operations(function):
        text = jax.jit(function).lower(x).compile().as_text()
        return Counter(re.findall(r"= \S+ ([a-z\-]+)\(", text))

    ours, by_hand = operations(partial(fake_quant, bits=3)), operations(partial(written_with_keepdims, bits=3))
    assert ours["fusion"] <= by_hand["fusion"]
    assert ours["reduce"] == by_hand["reduce"] == 2
    assert ours["transpose"] == ours["copy"] == 0


@pytest.mark.parametrize("granularity", ACT_GRANULARITIES)
def test_a_mapped_batch_has_the_ranges_of_the_whole(granularity):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 3, 3, 2)), jnp.float32)
    mapped = jax.vmap(partial(fake_quant, bits=3, granularity=granularity, axis_name="batch"), axis_name="batch")
    expected = fake_quant(x, bits=3, granularity=granularity)
    np.testing.assert_array_equal(mapped(x.reshape(2, 2, 3, 3, 2)).reshape(x.shape), expected)


@pytest.mark.parametrize(
    ("error", "words", "x", "kwargs"),
    [
        (ValueError, ("bits", "1", "2 to 8"), jnp.ones((2, 3)), {"bits": 1}),
        (ValueError, ("bits", "9", "2 to 8"), jnp.ones((2, 3)), {"bits": 9}),
        (TypeError, ("bits", "3.0"), jnp.ones((2, 3)), {"bits": 3.0}),
        (TypeError, ("bits", "True"), jnp.ones((2, 3)), {"bits": True}),
        (TypeError, ("int32", "floating"), jnp.ones((2, 3), jnp.int32), {"bits": 3}),
        (ValueError, ("1 dimensions",), jnp.ones(3), {"bits": 3}),
        (ValueError, ("granularity", "'row'", "sample_channel"), jnp.ones((2, 3)), {"bits": 3, "granularity": "row"}),
        (ValueError, ("impl", "'cuda'", "auto"), jnp.ones((2, 3)), {"bits": 3, "impl": "cuda"}),
    ],
)
def test_bad_input_is_refused(error, words, x, kwargs):
    with one_line_error(error, *words):
        fake_quant(x, **kwargs)
