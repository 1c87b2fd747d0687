"""Max pooling: values and gradients are those of Flax's, on ties too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.ops.pooling import max_pool


def plain(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (1, 7, 9, 2), (2, 1, 4, 1), (1, 2, 5, 2)])
@pytest.mark.parametrize("levels", [3, 10_000])  # few: many windows have several largest values
def test_values_and_gradients(x64, shape, levels):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-levels, levels, shape) / levels)
    y, pull_back = jax.vjp(jax.jit(max_pool), x)
    expected, expected_pull_back = jax.vjp(jax.jit(plain), x)
    np.testing.assert_array_equal(y, expected)
    cotangent = jnp.asarray(rng.normal(size=y.shape))
    np.testing.assert_allclose(pull_back(cotangent)[0], expected_pull_back(cotangent)[0], rtol=1e-12)


def test_a_byte_an_output_is_kept_for_the_gradient():
    (y, pull_back) = jax.vjp(max_pool, jnp.ones((1, 8, 8, 2)))
    (kept,) = jax.tree.leaves(pull_back)
    assert (kept.dtype, kept.shape) == (jnp.uint8, y.shape)


def test_dtypes_are_kept():
    x = jnp.arange(16, dtype=jnp.bfloat16).reshape(1, 4, 4, 1)
    y, pull_back = jax.vjp(max_pool, x)
    assert y.dtype == pull_back(y)[0].dtype == jnp.bfloat16
