"""What comes before the quantizer, fused with it: the same values and gradients as layer by layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import out_channel, sample_channel

from granq_jax import QuantSpec, create_model, fake_quant, quantize
from granq_jax.models.layers import ACTIVATIONS, Activation
from granq_jax.quant.fake_quant import FrozenNorm, norm_act_fake_quant
from tests.kernels.levels import normal

SHAPE = (2, 5, 4, 6)


def arguments():
    channels = SHAPE[-1]
    norm = FrozenNorm(normal(channels, seed=1), 1 + normal(channels, seed=2) ** 2, normal(channels, seed=3))
    return normal(SHAPE), norm, normal(SHAPE, seed=4)


def layer_by_layer(x, norm, residual, activation):
    if norm is not None:
        mean, factor, bias = (number[None, None, None] for number in norm)
        x = (x - mean) * factor + bias
    x = x + residual if residual is not None else x
    return fake_quant(ACTIVATIONS[activation](x), bits=3, impl="xla")


@pytest.mark.parametrize("impl", ["auto", "pallas_interpret"])
@pytest.mark.parametrize(("parts", "activation"), [("norm residual", "relu"), ("norm", "relu6"), ("", "relu")])
def test_gradients_are_those_of_the_layers(impl, parts, activation):
    x, norm, residual = arguments()
    operands = (x, norm if "norm" in parts else None, residual if "residual" in parts else None)

    def fused(x, norm, residual):
        return norm_act_fake_quant(x, bits=3, norm=norm, residual=residual, activation=activation, impl=impl)

    cotangent = normal(SHAPE, seed=5)
    (y, pull_back), (expected, expected_pull_back) = (
        jax.vjp(jax.jit(f), *operands) for f in (fused, partial(layer_by_layer, activation=activation))
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(pull_back(cotangent)), jax.tree.leaves(expected_pull_back(cotangent)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_rounded_to_0_still_passes_its_gradient_on():
    x = jnp.array([0.0, 0.1, 2.0, 3.0]).reshape(1, 4, 1, 1)
    gradient = jax.grad(lambda x: norm_act_fake_quant(x, bits=2, activation="relu").sum())(x)
    np.testing.assert_array_equal(gradient.ravel(), [0, 1, 1, 1])


def test_the_activation_within_what_is_fused_may_be_named():
    model, images = create_model("resnet8_digits"), jnp.zeros((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    for wanted in ("Activation", Activation):
        student = quantize(model, QuantSpec(activation_modules=(wanted,)), impl="auto")
        _, activations = jax.eval_shape(partial(student.apply_with_activations, train=False), variables, images)
        assert len(activations) == 7


def test_it_can_be_vmapped():
    x, norm, residual = (jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), part) for part in arguments())
    fused = partial(norm_act_fake_quant, bits=3, activation="relu", impl="pallas_interpret")
    y = jax.vmap(lambda x, norm, residual: fused(x, norm=norm, residual=residual))(x, norm, residual)
    for i in range(3):
        one = fused(x[i], norm=jax.tree.map(lambda a, i=i: a[i], norm), residual=residual[i])
        np.testing.assert_allclose(y[i], one, rtol=1e-6, atol=1e-6)


def test_it_can_be_pmapped():
    x, norm, residual = arguments()
    fused = partial(norm_act_fake_quant, bits=3, activation="relu", impl="pallas_interpret")
    mapped = jax.pmap(lambda x: jax.grad(lambda x: (fused(x, norm=norm, residual=residual) ** 2).sum())(x))
    expected = jax.grad(lambda x: (fused(x, norm=norm, residual=residual) ** 2).sum())(x)
    np.testing.assert_allclose(mapped(x[None])[0], expected, rtol=1e-5, atol=1e-5)


def student_text(platform, spec=None, **kwargs):
    model, images = create_model("resnet8_digits"), jnp.zeros((4, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    student = quantize(model, spec or QuantSpec(), **kwargs)

    def loss(params, variables):
        return student.apply({**variables, "params": params}, images, train=False).sum()

    traced = jax.jit(jax.grad(loss)).trace(variables["params"], variables)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_student_for_gpus_has_a_kernel_at_every_site_and_nothing_else_that_rounds(platform):
    text = student_text(platform, impl="pallas")
    assert sample_channel.NAME in text
    assert out_channel.NAME in text
    assert "round_nearest_even" not in text


@pytest.mark.parametrize(
    ("platform", "spec", "kwargs"),
    [
        ("cpu", None, {}),
        ("cuda", None, {"impl": "xla"}),
        ("cuda", QuantSpec(act_granularity="tensor", weight_granularity="kernel"), {}),
    ],
)
def test_no_kernel(platform, spec, kwargs):
    text = student_text(platform, spec, **kwargs)
    assert "triton" not in text
    assert "round_nearest_even" in text


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "pallas_interpret"])
def test_a_student_is_the_same_fused(impl):
    model, images = create_model("resnet8_digits"), normal((4, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def logits_and_gradients(impl):
        student = quantize(model, QuantSpec(weight_bits=8, act_bits=8), impl=impl)

        def loss(params):
            logits = student.apply({**variables, "params": params}, images, train=False)
            return (logits**2).sum(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (ours, logits), (theirs, expected) = logits_and_gradients(impl), logits_and_gradients("xla")
    # A value at a tie that falls to the other side moves by a level, 1/255 of its range, and carries on.
    np.testing.assert_allclose(logits, expected, rtol=0.03, atol=0.03)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05 * np.abs(b).max())
