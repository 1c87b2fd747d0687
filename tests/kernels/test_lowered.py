"""A kernel or another form, by what a program is lowered for: on functions that stand in for both."""

import logging
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import lowered
from granq_jax.kernels.lowered import NoKernelError, kernel_or

X = jnp.arange(6.0).reshape(2, 3) / 7
FORM, KERNEL = "cosine", "tanh"


def kernel_of(x, y=None):
    return {"a": jnp.tanh(x), "b": None}


def form_of(x, y=None):
    return {"a": jnp.cos(x), "b": None}


def failing(x, y=None):
    raise NotImplementedError("not on this one")


def giving_way(x, y=None):
    lowered.give_way_unless(False)
    return kernel_of(x, y)


def text(platforms, kernel=kernel_of, **how):
    function = jax.jit(partial(kernel_or, form_of, kernel, **how))
    return function.trace(X, None).lower(lowering_platforms=platforms).as_text()


@pytest.fixture
def notes(caplog):
    lowered._said.clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]
    lowered._said.clear()


@pytest.mark.parametrize(
    ("platform", "there", "absent"), [("cpu", FORM, KERNEL), ("cuda", KERNEL, FORM), ("rocm", KERNEL, FORM)]
)
def test_the_platform_decides(platform, there, absent, notes):
    program = text((platform,))
    assert there in program
    assert absent not in program
    assert not notes()


def test_a_kernel_gives_way_to_a_faster_form_unless_it_is_required(notes):
    assert FORM in text(("cuda",), giving_way)
    assert KERNEL in text(("cuda",), giving_way, required=True)
    assert KERNEL in text(("cuda",), lambda x, y: (lowered.give_way_unless(True), kernel_of(x, y))[1])
    assert not notes()
    np.testing.assert_array_equal(giving_way(X)["a"], jnp.tanh(X))  # called by itself


def test_a_program_for_several_platforms_has_both(notes):
    program = text(("cpu", "cuda"))
    assert FORM in program
    assert KERNEL in program


def test_where_no_kernel_can_be_lowered_the_form_is_and_that_is_said_once(notes):
    def failing_otherwise(x, y=None):
        raise NotImplementedError(f"for {x.shape}")

    for kernel in (failing, failing, failing_otherwise):
        program = text(("cuda",), kernel)
        assert FORM in program
    (note,) = notes()
    assert "NotImplementedError: not on this one" in note


@pytest.mark.parametrize(("platform", "words"), [("cpu", "cuda, rocm, not for cpu"), ("cuda", "not on this one")])
def test_a_kernel_that_is_required_is_not_replaced(platform, words, notes):
    with pytest.raises(NoKernelError, match=words):
        text((platform,), failing, required=True)
    assert KERNEL in text(("cuda",), required=True)
    assert not notes()


def test_it_is_not_traced_where_it_is_not_wanted():
    def traced(x, y):
        raise AssertionError

    np.testing.assert_array_equal(kernel_or(form_of, traced, X, None)["a"], jnp.cos(X))


@pytest.mark.parametrize("transformed", [jax.vmap, jax.pmap, jax.jit, jax.checkpoint])
def test_transformations_are_those_of_the_form(transformed):
    x = X[None] if transformed is jax.pmap else X
    found = transformed(lambda x: kernel_or(form_of, kernel_of, x, None)["a"])(x)
    np.testing.assert_allclose(found, jnp.cos(x), rtol=1e-6)


def test_operands_may_be_mapped_along_any_axis_or_none():
    def both(x, y):
        return kernel_or(lambda x, y: x * y, lambda x, y: y * x, x, y)

    found = jax.vmap(jax.vmap(both, (1, None)), (None, 0))(X, jnp.arange(2.0))
    np.testing.assert_allclose(found, jnp.arange(2.0)[:, None, None] * X.T[None], rtol=1e-6)


def test_derivatives_are_those_of_the_form():
    function = lambda x: kernel_or(jnp.sin, jnp.tanh, x).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(function)(X), jnp.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(function, (X,), (X,))[1], (jnp.cos(X) * X).sum(), rtol=1e-6)


def test_without_jit():
    with jax.disable_jit():
        np.testing.assert_allclose(kernel_or(form_of, kernel_of, X, None)["a"], jnp.cos(X), rtol=1e-6)


def test_it_can_be_exported_for_a_free_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    function = jax.jit(lambda x: kernel_or(jnp.sin, jnp.tanh, x))
    exported = jax.export.export(function)(jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    np.testing.assert_allclose(exported.call(X), jnp.sin(X), rtol=1e-6)
