import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.models.layers import batch_moments
from granq_jax.ops import reductions
from granq_jax.ops.reductions import channel_means, channel_sums, over_pixels

# Pixels that halve many times, that are odd, a prime number, too few for two stages, none.
SHAPES = [(16, 16, 16, 32), (16, 8, 8, 64), (3, 15, 15, 5), (1, 521, 1, 4), (4, 8, 8, 3), (7, 3), (0, 4, 4, 2)]


@pytest.fixture
def for_gpus(monkeypatch):
    """The forms that GPUs compute, computed here."""
    monkeypatch.setattr(reductions, "by_platform", lambda *operands, default, **_: default(*operands))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_stages_give_the_sums_means_and_gradients_of_one(shape, for_gpus, x64):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=shape), rng.normal(size=shape)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(channel_sums(jnp.asarray(x)), x.sum(axes), rtol=1e-12, atol=1e-12)
    if x.size:
        np.testing.assert_allclose(channel_means(jnp.asarray(x)), x.mean(axes), rtol=1e-12, atol=1e-12)

    def loss(number):
        return jnp.sum(weights * over_pixels(number, shape))

    number = jnp.arange(1.0, shape[-1] + 1)
    np.testing.assert_array_equal(over_pixels(number, shape), np.broadcast_to(number, shape))
    np.testing.assert_allclose(jax.grad(loss)(number), weights.sum(axes), rtol=1e-12, atol=1e-12)


def test_moments_in_two_stages_and_their_gradients_are_those_in_one(monkeypatch, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (8, 9, 8, 6)))

    def moments_and_gradient():
        jax.clear_caches()  # of the functions that are jitted in it
        gradient = jax.grad(lambda x: sum(jnp.sum(jnp.sin(moment)) for moment in batch_moments(x)))
        return *batch_moments(x), gradient(x)

    plain = moments_and_gradient()
    monkeypatch.setattr(reductions, "by_platform", lambda *operands, default, **_: default(*operands))
    staged = moments_and_gradient()
    jax.clear_caches()
    for got, wanted in zip(staged, plain, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_numbers_are_summed_in_float32(dtype, for_gpus):
    # 1 and then numbers that a sum in `dtype` would lose, and a sum beyond the largest float16.
    x = jnp.full((1, 64, 64, 2), 2**-9, dtype).at[0, 0].set(1)
    np.testing.assert_array_equal(channel_sums(x), jnp.full(2, 64 + 2**-9 * 63 * 64, dtype))
    np.testing.assert_array_equal(channel_means(jnp.full((4, 64, 64, 2), 30.0, dtype)), jnp.full(2, 30, dtype))
    assert channel_sums(x).dtype == channel_means(x).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [channel_sums, channel_means])
def test_gpus_sum_what_is_more_than_few_pixels_in_two_stages(function, shape):
    traced = jax.jit(function).trace(jnp.ones(shape, jnp.float32))
    staged, plain = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu"))
    pixels = math.prod(shape[:-1])
    divides = any(pixels % n == 0 for n in range(2, math.isqrt(pixels) + 1))
    assert staged.count("stablehlo.reduce(") == (2 if pixels > 256 and divides else 1)
    assert plain.count("stablehlo.reduce(") == 1
    assert ("optimization_barrier" in staged) == (staged.count("stablehlo.reduce(") == 2)
