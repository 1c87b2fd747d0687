"""Ranges that are kept: against a naive moving average, and what they do to values outside of them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granq_jax import Activation, QuantSpec, create_model, dequantize, quantize
from granq_jax.quant import storage_bytes
from granq_jax.quant.ranges import RANGES, codes_within, fake_quant_within, measured
from tests.conftest import one_line_error
from tests.quant import reference

SPEC = QuantSpec(weight_bits=None, act_bits=3, act_granularity="tensor", act_ranges="moving_average")


class TwoActivations(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="first")(x)
        return nn.Dense(4, name="second")(nn.relu(x))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ranges_are_a_moving_average_that_stays_when_it_may_not_move(x64, granularity):
    model, rng = TwoActivations(), np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(size=(6, 3))) for _ in range(4)]
    variables = model.init(jax.random.key(0), batches[0])
    spec = QuantSpec(weight_bits=None, placement="operand", act_granularity=granularity, act_ranges="moving_average")
    student = quantize(model, spec)
    state = dict(variables)
    for batch in batches:
        _, moved = student.apply(state, batch, mutable=[RANGES])
        state |= moved
    axes = None if granularity == "tensor" else 0
    low, high = (getattr(np.asarray(batches[0]), m)(axis=axes, keepdims=True) for m in ("min", "max"))
    for batch in batches[1:]:
        low = 0.9 * low + 0.1 * np.asarray(batch).min(axis=axes, keepdims=True)
        high = 0.9 * high + 0.1 * np.asarray(batch).max(axis=axes, keepdims=True)
    np.testing.assert_allclose(state[RANGES]["first"]["range0"], [low, high], rtol=1e-12)

    x = 3 * batches[0]
    _, inputs = student.apply_with_activations(state, x)
    naive = np.clip(np.asarray(x), low, high)
    np.testing.assert_allclose(inputs[0], reference.fake_quant_within(naive, low, high, 3), rtol=0, atol=1e-12)
    assert not np.allclose(inputs[0], student.apply_with_activations(variables, x)[1][0])  # measured on x itself


def test_without_kept_ranges_those_of_the_batch_are_used():
    model, x = TwoActivations(), jnp.linspace(-1, 1, 12).reshape(4, 3)
    variables = model.init(jax.random.key(0), x)
    kept, dynamic = (
        quantize(model, QuantSpec(weight_bits=None, placement="operand", act_granularity="tensor", act_ranges=ranges))
        for ranges in ("moving_average", "dynamic")
    )
    np.testing.assert_allclose(kept.apply(variables, x), dynamic.apply(variables, x), rtol=1e-6)


@given(
    st.integers(2, 8),
    st.floats(-50, 50, width=32),
    st.floats(0, 100, width=32),
    st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8),
)
def test_levels_within_a_range(bits, low, width, numbers):
    with jax.enable_x64(True):
        x = jnp.asarray(numbers, jnp.float64)[None]
        within = jnp.asarray([low, low + width], jnp.float64).reshape(2, 1, 1)
        y = fake_quant_within(x, within, bits)
        codes = codes_within(x, within, bits)
        np.testing.assert_allclose(dequantize(codes), y, rtol=1e-12, atol=1e-12)
    expected = reference.fake_quant_within(np.asarray(x), low, low + width, bits)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert np.abs(codes.codes.astype(int) + 0.5).max() < 2 ** (bits - 1)


def test_gradients_pass_straight_through_outside_the_range_too():
    x, within = jnp.array([[-9.0, 0.2, 9.0]]), jnp.array([[[-1.0]], [[1.0]]])
    weights = jnp.array([[1.0, 2.0, 3.0]])
    gradient = jax.grad(lambda x: jnp.sum(weights * fake_quant_within(x, within, 2)))(x)
    np.testing.assert_array_equal(gradient, weights)
    assert fake_quant_within(x.astype(jnp.bfloat16), within, 2).dtype == jnp.bfloat16
    assert np.isnan(fake_quant_within(x.at[0, 1].set(jnp.nan), within, 2)).tolist() == [[False, True, False]]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ranges_are_those_of_all_devices(granularity):
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 3, 5))
    parts = jax.vmap(lambda part: measured(part, granularity, "batch"), axis_name="batch")(x)
    for part in parts:
        np.testing.assert_array_equal(part, measured(x.reshape(8, 3, 3, 5), granularity))
    assert parts.shape == (4, 2, 1, 1, 1, 5 if granularity == "channel" else 1)


def test_the_zoo_keeps_a_range_for_every_activation():
    model, images = create_model("resnet8_digits"), jnp.ones((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    student = quantize(model, SPEC)
    _, ranges = jax.eval_shape(lambda v: student.apply(v, images, mutable=[RANGES]), variables)
    kept = {**variables, **ranges}
    _, moved = jax.eval_shape(lambda v: student.apply(v, images, mutable=[RANGES]), kept)
    assert jax.tree.structure(moved) == jax.tree.structure(ranges)
    sites = [site for site in student.sites(kept, images) if site.kind == "activation"]
    assert len(sites) == len(jax.tree.leaves(ranges)) == 7
    assert {site.effective_bits for site in sites} == {3.0}
    sizes = [storage_bytes(tree, student.spec) for tree in (variables, kept)]
    assert sizes[0]["teacher"] == sizes[1]["teacher"]
    assert sizes[1]["full_precision"] == sizes[0]["full_precision"] + 7 * 2 * 4


class Twice(nn.Module):
    """One module for two activations of different widths, beside a submodule of the same name."""

    def setup(self):
        self.act = Activation()
        self.first, self.second = nn.Dense(3), nn.Dense(5)

    def __call__(self, x):
        return self.act(self.second(self.act(self.first(x))))


def test_a_module_that_is_called_twice_keeps_two_ranges():
    model, x = Twice(), jnp.linspace(-1, 1, 12).reshape(4, 3)
    variables = model.init(jax.random.key(0), x)
    student = quantize(model, dataclasses.replace(SPEC, act_granularity="channel"))
    _, kept = student.apply(variables, x, mutable=[RANGES])
    _, moved = student.apply({**variables, **kept}, x, mutable=[RANGES])
    assert [leaf.shape for leaf in jax.tree.leaves(moved)] == [(2, 1, 3), (2, 1, 5)]


def test_codes_are_counted_within_the_kept_range():
    model, x = TwoActivations(), jnp.linspace(-1, 1, 12).reshape(4, 3)
    variables = model.init(jax.random.key(0), x)
    student = quantize(model, dataclasses.replace(SPEC, placement="operand"))
    _, moved = student.apply(variables, x, mutable=[RANGES])
    first = next(
        o for o in student.observe(variables, {**variables, **moved}, 0 * x + 5) if o.site.kind == "activation"
    )
    assert first.code_counts.tolist() == [0] * 7 + [12]  # all beyond the range that x had


@pytest.mark.parametrize("granularity", ["sample_channel", "sample"])
def test_ranges_of_single_samples_cannot_be_kept(granularity):
    with one_line_error(ValueError, "QuantSpec.act_granularity", granularity, "'channel', 'tensor'"):
        QuantSpec(act_granularity=granularity, act_ranges="moving_average")
    with one_line_error(ValueError, "QuantSpec.act_ranges", "'static'", "dynamic"):
        QuantSpec(act_ranges="static")
