import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.models.layers import batch_moments, moments_of_all


@pytest.mark.parametrize("devices", [1, 2, 4])
# At an offset of 1e6 E[x^2] - E[x]^2 has no digit left.
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-12), (1e6, 1e-6)])
def test_moments_and_gradients_over_devices_are_those_of_the_whole_batch(devices, offset, tolerance, x64):
    rng = np.random.default_rng(0)
    x = rng.normal(offset, 1e-3, (8, 3, 5, 7)) + rng.normal(0, 1e-2, (8, 1, 1, 7))
    weights = rng.normal(size=(2, 7))

    def loss(x, axis_name=None):
        return sum(w @ moment for w, moment in zip(weights, batch_moments(x, axis_name), strict=True))

    parts = x.reshape(devices, -1, *x.shape[1:])
    over_devices = jax.vmap(lambda x: batch_moments(x, "batch"), axis_name="batch")(parts)
    for got, wanted in zip(over_devices, (x.mean((0, 1, 2)), x.var((0, 1, 2))), strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(wanted, (devices, 7)), rtol=tolerance)
    # Each device has the loss, and a collective carries the cotangents of all of them.
    gradients = jax.vmap(jax.grad(lambda x: loss(x, "batch")), axis_name="batch")(parts) / devices
    np.testing.assert_allclose(gradients.reshape(x.shape), jax.grad(loss)(jnp.asarray(x)), rtol=tolerance, atol=1e-15)


def test_gradients_of_moments_of_any_order_are_those_of_the_formula(x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 3.0, (5, 3, 4, 6)))
    weights = jnp.asarray(rng.normal(size=(2, 6)))

    def formula(x):
        return jnp.mean(x, (0, 1, 2)), jnp.mean((x - jnp.mean(x, (0, 1, 2), keepdims=True)) ** 2, (0, 1, 2))

    def first(moments):
        return jax.grad(lambda x: sum(jnp.sum(w * jnp.sin(m)) for w, m in zip(weights, moments(x), strict=True)))

    def second(moments):
        return jax.grad(lambda x: jnp.sum(jnp.cos(100 * first(moments)(x))))

    for order in (first, second):
        np.testing.assert_allclose(order(batch_moments)(x), order(formula)(x), rtol=1e-10, atol=1e-13)


def test_moments_of_trees_keep_their_structure():
    mean, variance = {"a": jnp.zeros(2), "b": (jnp.ones(3),)}, {"a": jnp.ones(2), "b": (jnp.zeros(3),)}
    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 2]), (mean, variance))
    means, variances = jax.vmap(lambda tree: moments_of_all(*tree, "batch"), axis_name="batch")(stacked)
    assert jax.tree.map(lambda x: x[0].tolist(), means) == {"a": [1, 1], "b": ([2, 2, 2],)}
    # Variances 1 and 3, or 0 and 2, and means that lie 1 from their own mean.
    assert jax.tree.map(lambda x: x[1].tolist(), variances) == {"a": [3, 3], "b": ([2, 2, 2],)}
