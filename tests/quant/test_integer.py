"""Integer arithmetic: sums are exact, and layers and models compute what floating point does."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from granq_jax import QuantSpec, create_model, quantize
from granq_jax.quant import RANGES
from granq_jax.quant.integer import convolution_sums, product_sums
from tests.conftest import one_line_error


def naive_sums(x, w, strides, padding, dilation, groups):
    """The sums of a two-dimensional convolution, tap by tap, in int64."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    (n, height, width, _), (rows, columns, share, outputs) = x.shape, w.shape
    tall = (rows - 1) * dilation[0] + 1
    wide = (columns - 1) * dilation[1] + 1
    out_h = (height + sum(padding[0]) - tall) // strides[0] + 1
    out_w = (width + sum(padding[1]) - wide) // strides[1] + 1
    sums = np.zeros((4, n, out_h, out_w, outputs), np.int64)
    for h in range(out_h):
        for v in range(out_w):
            for i in range(rows):
                for j in range(columns):
                    row = h * strides[0] + i * dilation[0] - padding[0][0]
                    column = v * strides[1] + j * dilation[1] - padding[1][0]
                    if not (0 <= row < height and 0 <= column < width):
                        continue
                    for o in range(outputs):
                        first = o // (outputs // groups) * share
                        inputs, weights = x[:, row, column, first : first + share], w[i, j, :, o]
                        sums[0, :, h, v, o] += inputs @ weights
                        sums[1, :, h, v, o] += inputs.sum(-1)
                        sums[2, :, h, v, o] += weights.sum()
                        sums[3, :, h, v, o] += share
    return sums


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    share, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return {
        "groups": groups,
        "shape": (draw(st.integers(1, 2)), draw(st.integers(3, 6)), draw(st.integers(3, 6)), groups * share),
        "kernel": (*draw(pair), share, groups * each),
        "strides": draw(pair),
        "padding": [draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in range(2)],
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "bits": (draw(st.integers(2, 8)), draw(st.integers(2, 8))),
        "seed": draw(st.integers(0, 2**16)),
    }


def fits(layer):
    spans = [(k - 1) * d + 1 for k, d in zip(layer["kernel"], layer["dilation"], strict=False)]
    sizes = [s + sum(p) for s, p in zip(layer["shape"][1:3], layer["padding"], strict=True)]
    return all(span <= size for span, size in zip(spans, sizes, strict=True))


@pytest.mark.slow
@settings(max_examples=15)
@given(layers())
def test_sums_of_convolutions_are_exact(layer):
    assume(fits(layer))
    rng = np.random.default_rng(layer["seed"])
    x, w = (
        rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
        for bits, shape in zip(layer["bits"], (layer["shape"], layer["kernel"]), strict=True)
    )
    how = layer["strides"], layer["padding"], layer["dilation"], layer["groups"]
    sums = convolution_sums(jnp.asarray(x), jnp.asarray(w), *how)
    expected = naive_sums(x, w, *how)
    for ours, theirs in zip(sums, expected, strict=True):
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(np.broadcast_to(ours, theirs.shape), theirs)


def test_sums_at_the_ends_of_the_codes_are_exact():
    x, w = jnp.full((2, 4096), -128, jnp.int8), jnp.full((4096, 3), -128, jnp.int8)
    products, inputs, weights, taps = product_sums(x, w)
    assert (products == 128 * 128 * 4096).all()
    assert (inputs == -128 * 4096).all()
    assert (weights == -128 * 4096).all()
    assert (taps == 4096).all()


class Layer(nn.Module):
    """A convolution or dense layer of an activation that is nowhere 0, so that zero points matter."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


LAYERS = {
    "plain": (nn.Conv(5, (3, 3)), (2, 6, 5, 4)),
    "valid": (nn.Conv(5, (3, 2), padding="VALID", use_bias=False), (2, 6, 5, 4)),
    "strided, padded unevenly": (nn.Conv(5, (3, 3), strides=2, padding=((2, 0), (1, 1))), (2, 7, 7, 4)),
    "dilated": (nn.Conv(5, (3, 3), kernel_dilation=2), (1, 8, 8, 2)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 5, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), padding=1, feature_group_count=4), (2, 5, 5, 4)),
    "one pixel": (nn.Conv(5, (1, 1)), (2, 5, 5, 4)),
    "one axis": (nn.Conv(5, (3,)), (2, 9, 4)),
    "dense": (nn.Dense(5), (3, 7)),
    "dense over pixels": (nn.Dense(5), (2, 3, 3, 7)),
}


QUICK = ("strided, padded unevenly", "depthwise", "dense over pixels")
MORE = [pytest.param(bits, "moving_average", marks=pytest.mark.slow) for bits in (2, 8)]


@pytest.mark.parametrize(("bits", "ranges"), [(3, "dynamic"), *MORE])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_a_layer_computes_what_floating_point_does(x64, name, bits, ranges):
    layer, shape = LAYERS[name]
    model = Layer(layer)
    x = 1.7 + jax.random.normal(jax.random.key(0), shape, jnp.float64)
    variables = jax.tree.map(lambda leaf: leaf + 0.3, model.init(jax.random.key(1), x))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    granularity = "sample" if ranges == "dynamic" else "tensor"
    spec = QuantSpec(
        weight_bits=bits,
        act_bits=bits,
        weight_ranges="minmax" if ranges == "dynamic" else "mse",
        act_granularity=granularity,
        act_ranges=ranges,
        placement="operand",
    )
    integer, floating = (quantize(model, spec, arithmetic=kind) for kind in ("integer", "float"))
    if ranges == "moving_average":
        _, moved = floating.apply(variables, 0.5 * x, mutable=[RANGES])
        variables = {**variables, **moved}
    text = str(jax.make_jaxpr(integer.apply)(variables, x))
    assert "preferred_element_type=int32" in text
    on_integers, on_floats = jax.jit(integer.apply), jax.jit(floating.apply)
    np.testing.assert_allclose(on_integers(variables, x), on_floats(variables, x), rtol=1e-11, atol=1e-11)

    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (variables, x))
    exact = on_floats(*jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single))
    largest = float(jnp.abs(exact).max())
    if bits < 8:  # with 8, in the other precision something lies between two levels
        np.testing.assert_allclose(on_integers(*single), exact, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sample", "tensor"])
def test_a_network_computes_on_codes_wherever_both_are_quantized(x64, granularity):
    model = create_model("resnet8_digits")
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1), jnp.float64)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    # Fresh batch norms are identities: many activations then lie exactly between two levels.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.random(leaf.shape)), variables)
    spec = QuantSpec(weight_bits=3, act_bits=3, act_granularity=granularity)
    integer, floating = (quantize(model, spec, arithmetic=kind) for kind in ("integer", "float"))
    text = str(jax.make_jaxpr(integer.apply)(variables, images))
    # Every convolution but the first, of the image; the head reads what was pooled.
    weights = sum(site.kind == "weight" for site in integer.sites(variables, images))
    assert text.count("preferred_element_type=int32") == 4 * (weights - 2)
    np.testing.assert_allclose(
        jax.jit(integer.apply)(variables, images), jax.jit(floating.apply)(variables, images), rtol=1e-9, atol=1e-9
    )


def test_layers_whose_sums_would_not_fit_stay_in_floating_point():
    model, x = nn.Dense(2), jax.ShapeDtypeStruct((1, 2**18), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    spec = QuantSpec(weight_bits=8, act_bits=8, act_granularity="sample", placement="operand")
    student = quantize(model, spec, arithmetic="integer")
    assert "preferred_element_type=int32" not in str(jax.make_jaxpr(student.apply)(variables, x))
    student = quantize(model, dataclasses.replace(spec, act_bits=4), arithmetic="integer")
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(student.apply)(variables, x))


@pytest.mark.parametrize(
    ("field", "value"),
    [("act_granularity", "sample_channel"), ("act_granularity", "channel"), ("weight_granularity", "kernel")],
)
def test_ranges_along_what_is_summed_over_are_refused(field, value):
    spec = dataclasses.replace(QuantSpec(act_granularity="sample"), **{field: value})
    with one_line_error(ValueError, f"QuantSpec.{field}", repr(value), "'tensor'"):
        quantize(nn.Dense(2), spec, arithmetic="integer")
    with one_line_error(ValueError, "arithmetic", "'int'", "'float'"):
        quantize(nn.Dense(2), QuantSpec(), arithmetic="int")


def on_integers(model, x, **spec):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    student = quantize(model, QuantSpec(act_granularity="sample", **spec), arithmetic="integer")
    return "preferred_element_type=int32" in str(jax.make_jaxpr(student.apply)(variables, x))


class Derived(nn.Dense):
    """Computes something else than what it is derived from."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_layers_that_compute_something_else_stay_in_floating_point():
    assert on_integers(nn.Dense(2), jnp.ones((2, 3)), placement="operand")
    assert not on_integers(Derived(2), jnp.ones((2, 3)), placement="operand")
    assert on_integers(nn.Conv(2, (3, 3)), jnp.ones((2, 4, 4, 3)), placement="operand")
    assert not on_integers(nn.Conv(2, (3, 3)), jnp.ones((5, 2, 4, 4, 3)), placement="operand")
    assert not on_integers(nn.Conv(2, (3, 3), padding="CIRCULAR"), jnp.ones((2, 4, 4, 3)), placement="operand")


def test_ranges_are_those_of_all_devices(x64):
    model, x = Layer(nn.Dense(4)), jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    variables = model.init(jax.random.key(1), x)
    spec = QuantSpec(act_granularity="tensor", placement="operand")
    whole = quantize(model, spec, arithmetic="integer").apply(variables, x)
    part = quantize(model, spec, arithmetic="integer", axis_name="batch")
    parts = jax.vmap(lambda x: part.apply(variables, x), axis_name="batch")(x.reshape(2, 3, 5))
    np.testing.assert_allclose(parts.reshape(6, 4), whole, rtol=1e-12)


def test_what_is_missing_for_it_is_refused():
    for field in ("weight_bits", "act_bits"):
        with one_line_error(ValueError, f"QuantSpec.{field}", "None", "integer"):
            quantize(nn.Dense(2), QuantSpec(act_granularity="sample", **{field: None}), arithmetic="integer")
    model, x = nn.Dense(2), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    student = quantize(model, QuantSpec(act_granularity="sample", placement="operand"), arithmetic="integer")
    with one_line_error(TypeError, "arithmetic='integer'", "no gradient"):
        jax.grad(lambda x: student.apply(variables, x).sum())(x)
