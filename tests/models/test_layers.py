import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.models.layers import NORM_EPSILON, NormAct, batch_moments, moments_of_all


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


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_a_frozen_norm_and_its_gradients_are_those_of_flax(dtype, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 20, 3)), dtype)
    ours, of_flax = NormAct(None), nn.BatchNorm(use_running_average=True, epsilon=NORM_EPSILON)
    variables = jax.tree.map(lambda a: a + 0.37, ours.init(jax.random.key(0), x, train=False))

    def loss(apply):
        def of(params, x):
            y = apply({**variables, "params": params}, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float64))), y

        return jax.grad(of, (0, 1), has_aux=True)(variables["params"], x)

    got = loss(lambda variables, x: ours.apply(variables, x, train=False))
    wanted = loss(lambda variables, x: of_flax.apply({name: part["bn"] for name, part in variables.items()}, x))
    chex.assert_trees_all_equal_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6 if dtype != jnp.bfloat16 else 1e-2)
