import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax import Generator
from granq_jax.models.generator import BatchStatsNorm, UpsampleConv, four_phases, nine_products, upsample_conv
from tests.conftest import one_line_error
from tests.golden_figures import (
    CIFAR,
    CONDITIONAL_GENERATOR_NAMES,
    GENERATOR_NAMES,
    IMAGENET,
    generator_variables,
    state_dict,
)

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("golden", "names", "generator"),
    [
        (CIFAR, GENERATOR_NAMES, Generator(classes=10)),
        (IMAGENET, CONDITIONAL_GENERATOR_NAMES, Generator(classes=1000, image_size=224, conditional=True)),
    ],
)
def test_golden_images(x64, golden, names, generator):
    variables = generator_variables(state_dict(golden["gen/keys"]), generator.image_size // 4, names)
    z, labels = jnp.asarray(golden["gen/z"][0]), jnp.asarray(golden["gen/labels"][0])
    images, _ = generator.apply(variables, z, labels, mutable=["batch_stats"])
    np.testing.assert_allclose(images.mean((0, 1, 2)), golden["gen/images0_mean"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(images.std((0, 1, 2), ddof=1), golden["gen/images0_std"], rtol=1e-8)
    crop = images[:, :8, :8].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(crop, golden["gen/images0_crop"], rtol=1e-8, atol=1e-8)


def test_golden_statistics_of_the_conditional_generator(x64):
    """Stored under "after1", but as they are before any step: pins the names, not an update."""
    tensors = state_dict(IMAGENET["gen/keys"])
    for (collection, *_), name in CONDITIONAL_GENERATOR_NAMES.items():
        if collection == "batch_stats":
            np.testing.assert_array_equal(tensors[name], IMAGENET[f"gen/after1/{name}"])


def test_labels_choose_scale_and_shift(x64):
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((3, 2, 2, 4)), np.array([2, 0, 2])
    scale, bias = rng.standard_normal((2, 5, 4))
    norm = BatchStatsNorm(classes=5)
    variables = norm.init(jax.random.key(0), jnp.asarray(x), labels)
    variables = {**variables, "params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
    y, _ = norm.apply(variables, jnp.asarray(x), labels, mutable=["batch_stats"])
    for n, label in enumerate(labels):
        expected = (x[n] - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * scale[label] + bias[label]
        np.testing.assert_allclose(y[n], expected, rtol=1e-10)


def test_running_statistics_follow_pytorch(x64):
    x = np.random.default_rng(0).standard_normal((4, 3, 3, 2)) + 1
    norm = BatchStatsNorm()
    labels = jnp.zeros(4, int)
    variables = norm.init(jax.random.key(0), jnp.asarray(x), labels)
    _, updates = norm.apply(variables, jnp.asarray(x), labels, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-12)


@pytest.mark.parametrize("form", [upsample_conv, nine_products, four_phases])
@pytest.mark.parametrize(
    "shape",
    [(1, 5, 3, 2), pytest.param((2, 4, 4, 3), marks=SLOW), pytest.param((3, 1, 1, 4), marks=SLOW), (1, 2, 7, 1)],
)
def test_fast_forms_equal_up_sampling_and_convolution(x64, shape, form):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.standard_normal(shape)), jnp.asarray(rng.standard_normal((3, 3, shape[-1], 5)))
    cotangent = jnp.asarray(rng.standard_normal((shape[0], 2 * shape[1], 2 * shape[2], 5)))

    def plain(x, kernel):
        large = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(
            large, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, pull_expected = jax.vjp(plain, x, kernel)
    value, pull = jax.vjp(form, x, kernel)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10)
    for gradient, wanted in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-10)


def test_up_sampling_and_convolution_adds_the_bias():
    x = jnp.ones((1, 2, 3, 2))
    variables = {"params": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.arange(4.0)}}
    y = UpsampleConv(4).apply(variables, x)
    np.testing.assert_allclose(y, upsample_conv(x, variables["params"]["kernel"]) + jnp.arange(4.0).reshape(1, 1, 1, 4))


@pytest.mark.parametrize(
    ("size", "channels"),
    [(4, 1), pytest.param(8, 3, marks=SLOW), pytest.param(12, 1, marks=SLOW), pytest.param(28, 1, marks=SLOW)],
)
def test_image_sizes_and_channels(size, channels):
    generator = Generator(classes=3, image_size=size, channels=channels)
    z, labels = jax.random.normal(jax.random.key(0), (5, 16)), jnp.arange(5) % 3
    variables = generator.init(jax.random.key(1), z, labels)
    images, _ = generator.apply(variables, z, labels, mutable=["batch_stats"])
    assert images.shape == (5, size, size, channels)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "kwargs"),
    [
        (("image_size", "30", "multiples of 4"), {"image_size": 30}),
        (("image_size", "0"), {"image_size": 0}),
        (("channels", "2", "1 and 3"), {"channels": 2}),
    ],
)
def test_bad_sizes_are_refused(words, kwargs):
    with one_line_error(ValueError, "Generator", *words):
        Generator(classes=10, **kwargs)
