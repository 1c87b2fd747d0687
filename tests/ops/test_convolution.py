"""Every form of ``convolve`` against ``lax.conv_general_dilated``: values and gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from granq_jax.ops.convolution import convolve

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = {
    "1x1": ((5, 6, 7, 4), (1, 1, 4, 3), (1, 1), "VALID"),
    "1x1, strides over an odd image": ((5, 7, 5, 4), (1, 1, 4, 3), (2, 2), ((0, 0), (0, 0))),
    "1x1, padded": ((2, 4, 4, 3), (1, 1, 3, 2), (1, 1), ((1, 1), (1, 1))),
    "same": ((3, 7, 9, 4), (3, 3, 4, 5), (1, 1), "SAME"),
    "strides": ((3, 9, 7, 4), (3, 3, 4, 5), (2, 2), ((1, 1), (1, 1))),
    "parts that do not divide the batch": ((37, 32, 33, 24), (3, 3, 24, 16), (1, 1), ((1, 1), (1, 1))),
    "parts with strides": ((23, 31, 33, 24), (7, 7, 24, 8), (2, 2), ((3, 3), (3, 3))),
    "parts, even kernel, lopsided": ((21, 16, 17, 64), (2, 2, 64, 32), (1, 1), ((1, 0), (0, 1))),
    "few channels": ((3, 7, 8, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1))),
    "few channels, odd width": ((3, 6, 7, 9), (3, 3, 9, 12), (1, 1), "SAME"),
    "few channels, odd width out of an even one": ((3, 6, 8, 9), (3, 4, 9, 12), (1, 1), "VALID"),
    "few channels, lopsided": ((3, 5, 6, 8), (2, 3, 8, 9), (1, 1), ((1, 0), (3, 1))),
    "few channels, padded beyond the kernel": ((2, 4, 6, 8), (3, 3, 8, 8), (1, 1), ((3, 0), (4, 2))),
    "very few channels": ((3, 5, 8, 3), (3, 3, 3, 16), (1, 1), ((1, 1), (1, 1))),
    "very few channels, valid": ((3, 5, 10, 16), (3, 3, 16, 3), (1, 1), "VALID"),
    "few channels, cropped": ((3, 5, 6, 16), (3, 3, 16, 16), (1, 1), ((-1, 1), (1, -1))),
    "few channels and narrow": ((3, 5, 8, 16), (3, 3, 16, 1), (1, 1), ((1, 1), (1, 1))),
    "narrow, cropped": ((3, 7, 5, 40), (3, 3, 40, 3), (1, 1), ((1, -1), (-1, 1))),
    "narrow, smaller than the window": ((3, 2, 5, 40), (3, 3, 40, 3), (1, 1), "VALID"),
    "no samples": ((0, 6, 8, 16), (3, 3, 16, 16), (1, 1), "SAME"),
    "no samples, narrow": ((0, 6, 8, 40), (3, 3, 40, 3), (1, 1), "SAME"),
    "narrow": ((3, 7, 5, 20), (3, 3, 20, 2), (1, 1), ((1, 1), (1, 1))),
    "narrow, lopsided": ((3, 7, 5, 40), (2, 3, 40, 3), (1, 1), ((1, 0), (0, 2))),
    "narrow, valid": ((3, 7, 5, 40), (3, 2, 40, 3), (1, 1), "VALID"),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_plain_convolution(case, x64):
    shape, kernel_shape, strides, padding = CASES[case]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s)) for s in (shape, kernel_shape))
    plain, pull_plain = jax.vjp(
        lambda x, kernel: lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC), x, kernel
    )
    ours, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, strides, padding), x, kernel)
    np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = jnp.asarray(rng.normal(size=plain.shape))
    for got, expected in zip(pull(cotangent), pull_plain(cotangent), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


DEPTHWISE = {
    "same": ((3, 7, 9, 5), (3, 3), (1, 1), "SAME"),
    "strides over an odd image": ((2, 9, 7, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "strides over an even image": ((3, 8, 6, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "strides that differ": ((2, 8, 9, 4), (3, 3), (3, 1), "VALID"),
    "lopsided": ((2, 6, 5, 3), (2, 5), (1, 1), ((1, 0), (0, 3))),
    "padded beyond the kernel": ((2, 4, 5, 3), (3, 3), (1, 1), ((3, 4), (0, 5))),
    "one pixel": ((2, 1, 1, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "1x1": ((2, 4, 3, 3), (1, 1), (1, 1), "VALID"),
    "cropped": ((2, 6, 7, 3), (3, 3), (1, 1), ((-1, 1), (1, -1))),
    "smaller than the window": ((2, 2, 7, 3), (3, 3), (1, 1), "VALID"),
    "no samples": ((0, 6, 7, 3), (3, 3), (1, 1), "SAME"),
    "two features of each channel": ((2, 6, 7, 3), (3, 3), (1, 1), "SAME", 2),
}


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_values_and_gradients_are_those_of_the_plain_convolution(case, x64):
    shape, window, strides, padding, *features = DEPTHWISE[case]
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x, kernel = (jnp.asarray(rng.normal(size=s)) for s in (shape, (*window, 1, channels * sum(features or [1]))))
    options = {"dimension_numbers": NHWC, "feature_group_count": channels}
    outputs = [
        jax.vjp(lambda x, kernel, form=form: form(x, kernel, strides, padding, **options), x, kernel)
        for form in (lax.conv_general_dilated, convolve)
    ]
    (plain, pull_plain), (ours, pull) = outputs
    np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = jnp.asarray(rng.normal(size=plain.shape))
    for got, expected in zip(pull(cotangent), pull_plain(cotangent), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_a_depthwise_convolution_on_cpus_is_none_of_xlas():
    def step(x, kernel):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, (1, 1), "SAME", feature_group_count=4), x, kernel)
        return pull(y)

    arguments = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 1, 4))
    assert "stablehlo.convolution" not in jax.jit(step).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" in jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "kernel_shape"),
    [
        ({"feature_group_count": 4}, (3, 3, 1, 8)),
        ({"rhs_dilation": (2, 2)}, (3, 3, 4, 8)),
        ({"lhs_dilation": (2, 1)}, (3, 3, 4, 8)),
        ({"precision": lax.Precision.HIGHEST}, (3, 3, 4, 8)),
        ({"dimension_numbers": ("NHWC", "OHWI", "NHWC")}, (8, 3, 3, 4)),
    ],
)
def test_what_has_no_form_of_its_own_is_the_plain_convolution(options, kernel_shape):
    x, kernel, padding = jnp.ones((2, 6, 6, 4)), jnp.ones(kernel_shape), ((1, 1), (1, 1))
    expected = lax.conv_general_dilated(x, kernel, (1, 1), padding, **{"dimension_numbers": NHWC} | options)
    np.testing.assert_array_equal(convolve(x, kernel, (1, 1), padding, **options), expected)


def test_narrow_floats_are_added_up_as_xla_does():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 6, 6, 40), (3, 3, 40, 3)))
    expected = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    np.testing.assert_array_equal(convolve(x, kernel, (1, 1), "SAME"), expected)


def test_the_kernel_gradient_is_made_of_parts_on_a_cpu_only():
    x, kernel = jnp.ones((37, 32, 33, 24)), jnp.ones((3, 3, 24, 32))
    gradient = jax.jit(jax.grad(lambda kernel: convolve(x, kernel, (1, 1), "SAME").sum()))
    lowered = {p: gradient.trace(kernel).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    convolutions = {platform: text.count("stablehlo.convolution") for platform, text in lowered.items()}
    assert convolutions["cuda"] < convolutions["cpu"] <= 34


@pytest.mark.parametrize(("channels", "on_cpu"), [(27, 0), (16, 2)])
def test_the_forms_for_cpus_are_not_in_a_program_for_a_gpu(channels, on_cpu):
    x, kernel = jnp.ones((4, 32, 32, channels)), jnp.ones((3, 3, channels, 3))
    gradients = jax.jit(jax.grad(lambda x, kernel: convolve(x, kernel, (1, 1), "SAME").sum(), argnums=(0, 1)))
    for_gpu = gradients.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    for_cpu = gradients.trace(x, kernel).lower(lowering_platforms=("cpu",)).as_text()
    assert for_gpu.count("stablehlo.convolution") == 2
    assert for_cpu.count("stablehlo.convolution") == on_cpu
    assert "stride = [1, 4]" not in for_gpu
    assert ("stride = [1, 4]" in for_cpu) == (on_cpu > 0)
