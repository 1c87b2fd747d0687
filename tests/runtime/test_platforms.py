import jax
import jax.numpy as jnp
import pytest

from granq_jax.runtime.platforms import by_platform, traced_for


@jax.jit
def function(x):
    return by_platform(x, cpu=jnp.sin, default=jnp.cos)


def lowered(platform):
    return function.trace(1.0).lower(lowering_platforms=(platform,)).as_text()


def test_the_form_is_that_of_the_platform_lowered_for():
    assert "sine" in lowered("cpu")
    assert "cosine" in lowered("cuda")


def test_within_only_the_form_of_cpus_is_traced_and_nothing_of_that_remains():
    assert function(1.0) == jnp.sin(1.0)  # traced with both forms, and kept
    with traced_for(jax.devices("cpu")):
        assert "cos" not in str(jax.make_jaxpr(function)(1.0))
        assert function(1.0) == jnp.sin(1.0)
    assert "cos" in str(jax.make_jaxpr(function)(1.0))
    assert "cosine" in lowered("cuda")


def test_a_failure_within_ends_it():
    with pytest.raises(KeyError), traced_for(jax.devices("cpu")):
        raise KeyError
    assert "cosine" in lowered("cuda")


def test_other_devices_leave_all_forms():
    class Gpu:
        platform = "gpu"

    with traced_for([*jax.devices("cpu"), Gpu()]):
        assert "cosine" in lowered("cuda")
