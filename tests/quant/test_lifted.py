"""Models of all sorts, in plain and in lifted form: both are quantized alike, and everything is accounted for."""

import collections
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from granq_jax import QuantSpec, quantize
from granq_jax.distill.joint_step import apply_with_moments
from granq_jax.quant import in_full_precision, quantize_params
from tests.conftest import one_line_error
from tests.quant.models import Composed, Part, lifted_variables, plain_variables

BLOCKS = (
    *(f"conv {kind}" for kind in ("conv", "pointwise", "depthwise", "grouped", "local", "transposed", "turned")),
    *(f"product {kind}" for kind in ("dense", "heads", "einsum", "attention")),
    "excitation",
)
LIFTS = ("none", "shared", "jit", "remat", "scan", "vmap")
X = np.random.default_rng(0).standard_normal((3, 4, 4, 3))
NONE = QuantSpec(weight_bits=None, act_bits=None, placement="operand")
# Of a logit, what 8 bits may change: an input and a weight of each layer are off by up to half a step in 255.
BOUND = 0.1


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def check(parts, seed, bits, **fields):
    x = jnp.asarray(X)
    of_plain = plain_variables(parts, x, seed)
    of_lifted = lifted_variables(parts, of_plain)
    spec = QuantSpec(weight_bits=bits, act_bits=bits, placement="operand", **fields)
    (plain, lifted) = (quantize(Composed(parts, is_lifted), spec) for is_lifted in (False, True))

    (y, activations), (z, of_lifted_form) = (
        jax.jit(student.apply_with_activations)(v, x) for student, v in ((plain, of_plain), (lifted, of_lifted))
    )
    np.testing.assert_array_equal(y, jax.jit(plain.apply)(of_plain, x))
    np.testing.assert_array_equal(z, jax.jit(lifted.apply)(of_lifted, x))
    in_full = [jax.jit(s.model.apply)(v, x) for s, v in ((plain, of_plain), (lifted, of_lifted))]
    if (in_full[0] == in_full[1]).all():
        np.testing.assert_array_equal(y, z)
    else:  # what nn.vmap makes of a layer is another program, which may add up in another order
        assert relative(y, z) < 1e-9

    # A parallel form comes to its layers in another order than a loop.
    for part in parts:
        if part.lift == "vmap":
            activations, of_lifted_form = (
                sorted(arrays, key=lambda x: (x.shape, round(float(x.sum()), 6)))
                for arrays in (activations, of_lifted_form)
            )
    for a, b in zip(activations, of_lifted_form, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    return plain, of_plain, lifted, of_lifted, y, in_full[0]


def check_accounts(student, variables, moments):
    x = jnp.asarray(X)
    sites = student.sites(variables, x)
    arrays = collections.Counter(
        "/".join(path[:-1] if path[-1] == "kernel" else path)
        for path, leaf in flatten_dict(variables["params"]).items()
        if leaf.ndim > 1
    )
    assert collections.Counter(site.path for site in sites if site.kind == "weight") == arrays
    for site in sites:
        if site.bits is not None:
            assert site.effective_bits < 16, site
    for site in sites:
        assert site.bits is not None or site.path.rpartition("/")[2] in ("bias", "scale"), site
    norms = [leaf for path, leaf in flatten_dict(variables.get("batch_stats", {})).items() if path[-1] == "mean"]
    assert moments >= len(norms)


@st.composite
def compositions(draw):
    part = st.builds(Part, st.sampled_from(BLOCKS), st.sampled_from(("batch", "layer")), st.sampled_from(LIFTS))
    return tuple(draw(st.lists(part, min_size=1, max_size=3)))


@pytest.mark.slow
@settings(max_examples=12)
@given(parts=compositions(), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_composed_models(parts, seed, data):
    with jax.enable_x64(True):
        bits = data.draw(st.sampled_from((8, 3)), "bits")
        granularity = data.draw(st.sampled_from(("out_channel", "tensor")), "granularity")
        acts = data.draw(st.sampled_from(("sample_channel", "sample", "channel", "tensor")), "activations")
        plain, of_plain, lifted, of_lifted, y, in_full = check(
            parts, seed, bits, weight_granularity=granularity, act_granularity=acts
        )
        if bits == 8:
            assert relative(y, in_full) < BOUND
        counts = []
        for student, variables in ((plain, of_plain), (lifted, of_lifted)):
            in_full = quantize(student.model, NONE)
            (_, moments), _ = jax.eval_shape(lambda v, s=in_full: apply_with_moments(s, v, jnp.asarray(X)), variables)
            counts.append(len(jax.tree.leaves(moments)) // 2)
            if acts == "sample_channel":
                check_accounts(student, variables, counts[-1])
        assert counts[0] == counts[1]


@pytest.mark.parametrize("granularity", ["out_channel", "kernel", "tensor"])
@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("block", ["conv conv", "conv turned", "product heads", "product einsum"])
def test_stacked_weights_have_the_values_of_their_plain_form(block, lift, granularity):
    parts = (Part(block, "layer", lift),)
    of_plain = plain_variables(parts, jnp.asarray(X, jnp.float32), 5)
    of_lifted = lifted_variables(parts, of_plain)
    for ranges in ("minmax", "mse"):
        spec = QuantSpec(
            weight_bits=3, act_bits=None, weight_granularity=granularity, weight_ranges=ranges, placement="operand"
        )
        trees = [
            quantize_params(v["params"], spec, "xla", quantize(Composed(parts, is_lifted), spec).layouts(v, X))
            for v, is_lifted in ((of_plain, False), (of_lifted, True))
        ]
        stacked = lifted_variables(parts, {"params": trees[0]})["params"]
        for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(trees[1]), strict=True):
            np.testing.assert_array_equal(a, b)


class Reshaped(nn.Module):
    """A dense layer, said in the ways there are."""

    kind: str

    @nn.compact
    def __call__(self, x):
        n, t = x.shape[:2]
        if self.kind == "dense":
            return nn.Dense(12, use_bias=False, name="b")(nn.Dense(12, use_bias=False, name="a")(x))
        if self.kind == "general":
            return nn.DenseGeneral(12, axis=(-2, -1), use_bias=False, name="b")(
                nn.DenseGeneral((3, 4), use_bias=False, name="a")(x)
            ).reshape(n, t, 12)
        heads = nn.Einsum((9, 3, 4), "ntc,chd->nhtd", use_bias=False, name="a")(x)
        return nn.Einsum((3, 4, 12), "nhtd,hde->nte", use_bias=False, name="b")(heads)


@pytest.mark.parametrize("granularity", ["sample_channel", "channel", "sample", "tensor"])
@pytest.mark.parametrize("kind", ["general", "einsum"])
def test_reshaped_layers_are_quantized_as_their_plain_form(x64, kind, granularity):
    rng = np.random.default_rng(3)
    x, a, b = rng.standard_normal((2, 5, 9)), rng.standard_normal((9, 12)), rng.standard_normal((12, 12))
    spec = QuantSpec(weight_bits=3, act_bits=3, placement="operand", act_granularity=granularity)
    plain = {"params": {"a": {"kernel": a}, "b": {"kernel": b}}}
    shaped = {"params": {"a": {"kernel": a.reshape(9, 3, 4)}, "b": {"kernel": b.reshape(3, 4, 12)}}}
    expected = quantize(Reshaped("dense"), spec).apply(plain, x)
    student = quantize(Reshaped(kind), spec)
    np.testing.assert_allclose(student.apply(shaped, x), expected, rtol=1e-12, atol=1e-12)
    of_both = [
        [(s.path, s.kind, s.bits, s.effective_bits) for s in model.sites(v, x)]
        for model, v in ((student, shaped), (quantize(Reshaped("dense"), spec), plain))
    ]
    assert of_both[0] == of_both[1]


def test_one_pixel_counts_as_no_map(x64):
    x = np.random.default_rng(0).standard_normal((4, 1, 1, 40))
    model = nn.Sequential([nn.Conv(8, (1, 1)), lambda y: y])
    variables = model.init(jax.random.key(0), x)
    spec = QuantSpec(weight_bits=None, act_bits=3, placement="operand")
    y, (activation,) = quantize(model, spec).apply_with_activations(variables, x)
    assert max(np.unique(row).size for row in np.asarray(activation).reshape(4, -1)) == 8
    (site,) = [s for s in quantize(model, spec).sites(variables, x) if s.kind == "activation"]
    assert site.effective_bits == pytest.approx(3 + 64 / 40)
    flat = nn.Dense(8).apply(
        {"params": {"kernel": variables["params"]["layers_0"]["kernel"][0, 0], "bias": jnp.zeros(8)}}, activation
    )
    np.testing.assert_allclose(y, flat, rtol=1e-12)


class Jitted(nn.Module):
    cls: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.cls(name="block")(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(16)(x))


def test_what_is_jitted_within_a_model_is_traced_for_each_way_of_quantizing():
    """A class that ``nn.jit`` has made keeps its traces, and looks the same with and without a quantizer."""
    model, plain = Jitted(nn.jit(Inner)), Jitted(Inner)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 10)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    in_full = model.apply(variables, x)
    for bits in (2, 3):
        spec = QuantSpec(weight_bits=None, act_bits=bits, placement="operand")
        for _ in range(2):
            y = quantize(model, spec).apply(variables, x)
            np.testing.assert_allclose(y, quantize(plain, spec).apply(variables, x), rtol=1e-5, atol=1e-6)
            assert relative(y, in_full) > 0.01
            assert len(quantize(model, spec).apply_with_activations(variables, x)[1]) == 2
    np.testing.assert_array_equal(model.apply(variables, x), in_full)


class Subclass(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


@pytest.mark.parametrize("cls", [nn.remat(nn.Dense), nn.jit(nn.Dense), Subclass, nn.remat(Subclass)])
def test_a_call_is_met_once_through_transforms_and_super(cls):
    x = jnp.ones((2, 6))
    model = cls(4)
    sites = quantize(model, QuantSpec(placement="operand")).sites(model.init(jax.random.key(0), x), x)
    assert [site.kind for site in sites] == ["weight", "activation"]


class Branching(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, name="in")
        if self.is_initializing():
            inner(x)
        return nn.cond(x.sum() > 0, lambda layer, x: layer(x), lambda layer, x: x, inner, x)


def test_a_branch_is_refused_where_activations_are_asked_for():
    x = jnp.ones((2, 4))
    variables = Branching().init(jax.random.key(0), x)
    student = quantize(Branching(), QuantSpec(placement="operand"))
    assert student.apply(variables, x).shape == (2, 4)
    with one_line_error(ValueError, "inside a cond", "nn.scan"):
        student.sites(variables, x)


class Kept(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(_Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="s")(x, None)[0]


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1])(x), None


def test_kept_ranges_that_a_transform_keeps_out_are_refused():
    x = jnp.ones((2, 4))
    variables = Kept().init(jax.random.key(0), x)
    spec = QuantSpec(placement="operand", act_granularity="tensor", act_ranges="moving_average")
    assert quantize(Kept(), spec).apply(variables, x).shape == (2, 4)  # measured on the batch at hand
    for kept, mutable in (({"granq_ranges": {"s": {"Dense_0": {}}}}, False), ({}, ["granq_ranges"])):
        with one_line_error(ValueError, "moving_average", "s/Dense_0", "variable_axes"):
            quantize(Kept(), spec).apply({**variables, **kept}, x, mutable=mutable)


class Own(nn.Module):
    """A layer of somebody's own."""

    name_of_weight: str = "weight"

    @nn.compact
    def __call__(self, x):
        x = x @ self.param(self.name_of_weight, nn.initializers.lecun_normal(), (x.shape[-1], 16))
        return nn.Dense(4, name="head")(x + nn.Embed(3, 16, name="embed")(jnp.zeros(x.shape[0], int)))


def test_an_input_of_one_dimension_may_stay_as_it_is():
    model, x = nn.Sequential([nn.Dense(3)]), jnp.ones(4)
    variables = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(quantize(model, NONE).apply(variables, x), model.apply(variables, x))
    with one_line_error(ValueError, "(4,)", "'layers_0'", "two or more dimensions"):
        quantize(model, QuantSpec(placement="operand")).apply(variables, x)


@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_weights_of_layers_unknown_are_listed_and_named(name, caplog):
    x = jnp.ones((2, 6))
    variables = Own(name).init(jax.random.key(0), x)
    student = quantize(Own(name), QuantSpec(placement="operand"))
    with caplog.at_level(logging.WARNING):
        sites = student.sites(variables, x)
    weights = {site.path: site.bits for site in sites if site.kind == "weight"}
    assert weights == {"" if name == "kernel" else name: None, "head": 3, "embed/embedding": None}
    assert "full precision" in caplog.text
    assert student.shares(variables, x).weights == pytest.approx(64 / (64 + 96 + 48))


def test_a_layout_that_cannot_be_told_is_refused():
    model = nn.Einsum((2, 6, 4), "...d,...de->...e")
    x = jnp.ones((2, 6))
    variables = {"params": {"kernel": jnp.ones((2, 6, 4)), "bias": jnp.zeros((2, 4))}}
    with one_line_error(ValueError, "QuantSpec.weight_bits", "Einsum", "(2, 6, 4)", "override"):
        quantize(model, QuantSpec(placement="operand")).sites(variables, x)


class Tall(nn.Dense):
    """Keeps its weight as PyTorch does."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (self.features, x.shape[-1])).T


def test_a_subclass_with_a_weight_of_another_form_is_refused_by_name():
    model, x = nn.Sequential([Tall(5)]), jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)
    with one_line_error(ValueError, "'layers_0'", "Tall", "(5, 6)"):
        quantize(model, QuantSpec(placement="operand")).apply(variables, x)
    spec = QuantSpec(placement="operand", overrides=(("^layers_0$", {"weight_bits": None}),))
    assert quantize(model, spec).apply(variables, x).shape == (2, 5)


class Pair(nn.Module):
    def __call__(self, x):
        return nn.relu(x), x


class ReturnsPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Pair(name="pair")(nn.Dense(3)(x))[0]


def test_an_activation_module_that_returns_a_pair_is_refused():
    x = jnp.ones((2, 4))
    variables = ReturnsPair().init(jax.random.key(0), x)
    with one_line_error(ValueError, "activation_modules", "'pair'", "tuple"):
        quantize(ReturnsPair(), QuantSpec(activation_modules=("Pair",))).apply(variables, x)


class Pooled(nn.Module):
    """Layer inputs beside and behind activation modules."""

    @nn.compact
    def __call__(self, x):
        from granq_jax import Activation

        x = Activation(name="act")(nn.Conv(4, (3, 3), name="first")(x))
        moved = nn.max_pool(x, (2, 2), strides=(2, 2)).transpose(0, 2, 1, 3)
        x = nn.relu(nn.Conv(4, (3, 3), name="on_levels")(moved))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_inputs_that_come_from_no_quantized_activation_are_listed():
    x = jnp.ones((2, 8, 8, 1))
    variables = Pooled().init(jax.random.key(0), x)
    student = quantize(Pooled(), QuantSpec())
    inputs = [(site.path, site.shape) for site in student.sites(variables, x) if site.kind == "input"]
    assert inputs == [("first", (2, 8, 8, 1)), ("head", (2, 4))]
    sizes = math.prod((2, 8, 8, 1)), math.prod((2, 4, 4, 4)), math.prod((2, 4))
    assert student.shares(variables, x) == (1.0, pytest.approx(sizes[1] / sum(sizes)))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(3, kernel_init=init)(x)


def test_boxes_are_seen_through():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
    boxed = Boxed().init(jax.random.key(0), x)
    student = quantize(Boxed(), QuantSpec(placement="operand"))
    np.testing.assert_array_equal(student.apply(boxed, x), student.apply(nn.meta.unbox(boxed), x))
    assert student.sites(boxed, x) == student.sites(nn.meta.unbox(boxed), x)
    assert student.observe(boxed, boxed, x)[0].teacher_error > 0


def test_full_precision_of_a_lifted_model_is_the_model():
    parts = tuple(Part("conv conv", "batch", lift) for lift in LIFTS)
    x = jnp.asarray(X, jnp.float32)
    variables = lifted_variables(parts, plain_variables(parts, x, 0))
    model = Composed(parts, True)
    y = jax.jit(quantize(model, in_full_precision(NONE)).apply)(variables, x)
    np.testing.assert_array_equal(y, jax.jit(model.apply)(variables, x))
