"""Ranges of weights of least squared error: against a search in plain numpy, and what they promise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from granq_jax import QuantSpec, dequantize, fake_quant, quantize
from granq_jax.quant import quantize_params
from granq_jax.quant.ranges import fake_quant_within, of_least_error
from granq_jax.quant.spec import WEIGHT_GRANULARITIES
from granq_jax.quant.weights import quantize_weight
from tests.conftest import one_line_error
from tests.quant import reference

SHARES = [n / 16 for n in range(16, 5, -1)]


def squared(difference, granularity):
    return [np.sum(np.square(difference[group])) for group in reference.groups(difference.shape, granularity)]


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_is_that_of_a_search_in_numpy(x64, bits, granularity):
    weight = np.random.default_rng(bits).standard_t(4, size=(3, 3, 5, 7))
    ours = fake_quant_within(jnp.asarray(weight), of_least_error(jnp.asarray(weight), granularity, bits), bits)
    best, chosen = np.empty_like(weight), set()
    for group in reference.groups(weight.shape, granularity):
        x = weight[group]
        tried = [reference.fake_quant_within(x, share * x.min(), share * x.max(), bits) for share in SHARES]
        least = int(np.argmin([np.sum(np.square(y - x)) for y in tried]))
        best[group] = tried[least]
        chosen.add(least)
    np.testing.assert_allclose(ours, best, rtol=0, atol=1e-12)
    assert max(chosen) > 0


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.integers(2, 8),
    st.sampled_from(WEIGHT_GRANULARITIES),
    hnp.arrays(np.float32, st.sampled_from([(4, 3), (3, 2, 3)]), elements=st.floats(-100, 100, width=32)),
)
def test_no_group_is_worse_off_than_with_all_of_its_values(bits, granularity, weight):
    with jax.enable_x64(True):
        weight = jnp.asarray(weight, jnp.float64)
        clipped = fake_quant_within(weight, of_least_error(weight, granularity, bits), bits)
        whole = fake_quant(weight, bits=bits, granularity=granularity)
    for ours, theirs in zip(squared(clipped - weight, granularity), squared(whole - weight, granularity), strict=True):
        assert ours <= theirs * (1 + 1e-9) + 1e-12


def test_constant_groups_and_groups_that_are_not_finite_keep_to_themselves():
    weight = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    alone = quantize_params({"kernel": weight}, QuantSpec(weight_ranges="mse"))["kernel"]
    weight[:, 1], weight[3, 2], weight[5, 3] = 0.7, np.nan, np.inf
    together = quantize_params({"kernel": weight}, QuantSpec(weight_ranges="mse"))["kernel"]
    np.testing.assert_array_equal(together[:, 0], alone[:, 0])
    np.testing.assert_allclose(together[:, 1], 0.7, rtol=1e-6)
    assert np.isnan(together[:, 2:]).all()


def test_the_gradient_passes_straight_through():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.float32)
    cotangent = jnp.arange(18.0).reshape(9, 2)
    spec = QuantSpec(weight_ranges="mse", weight_bits=2)
    _, pull_back = jax.vjp(lambda kernel: quantize_params({"kernel": kernel}, spec)["kernel"], weight)
    np.testing.assert_array_equal(pull_back(cotangent)[0], cotangent)


def test_codes_stand_for_what_the_fake_quantizer_computes():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5)), jnp.float32)
    spec = QuantSpec(weight_ranges="mse")
    values = quantize_params({"kernel": weight}, spec)["kernel"]
    np.testing.assert_array_equal(dequantize(quantize_weight(weight, spec)), values)
    assert not np.allclose(values, quantize_params({"kernel": weight}, QuantSpec())["kernel"])
    assert quantize_weight(weight, QuantSpec(weight_bits=None, weight_ranges="mse")) is None


@pytest.mark.slow
def test_a_model_and_what_is_observed_of_it_use_them(x64):
    model, spec = nn.Dense(6), QuantSpec(act_bits=None, placement="operand", weight_ranges="mse")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)))
    variables = model.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    values = quantize_params({"kernel": kernel}, spec)["kernel"]
    np.testing.assert_allclose(quantize(model, spec).apply(variables, x), x @ values, rtol=1e-6)
    weight, _ = quantize(model, spec).observe(variables, variables, x)
    error = np.linalg.norm(values - kernel) / np.linalg.norm(kernel)
    assert float(weight.quantization_error) == pytest.approx(error, rel=1e-6)
    codes = np.asarray(quantize_weight(jnp.asarray(kernel), spec).codes)
    assert weight.code_counts.tolist() == np.bincount(codes.ravel() + 4, minlength=8).tolist()
    with one_line_error(ValueError, "QuantSpec.weight_ranges", "'best'", "'minmax', 'mse'"):
        QuantSpec(weight_ranges="best")
