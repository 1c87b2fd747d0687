import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.distill import losses
from tests.golden_figures import CIFAR, nhwc


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_golden_logit_losses(x64, classes):
    teacher, student, labels = (jnp.asarray(CIFAR[f"loss/{classes}/{key}"]) for key in ("teacher", "student", "labels"))
    values = {
        "ds": losses.discrepancy(teacher, student, labels),
        "as": losses.agreement(teacher, student, labels),
        "entropy_T1": losses.entropy(teacher - student),
        "marginal_u.8_l.1": losses.balance_hinge(teacher, student, 0.1, 0.8),
        "kd_T20": losses.distillation(teacher, student, 20.0),
        "kd_T5": losses.distillation(teacher, student, 5.0),
    }
    for key, value in values.items():
        np.testing.assert_allclose(value, CIFAR[f"loss/{classes}/{key}"], rtol=1e-9, atol=1e-12, err_msg=key)


def test_golden_attention_distillation(x64):
    teachers, students = ([nhwc(CIFAR[f"akt/{who}{i}"]) for i in (0, 1)] for who in ("teacher", "student"))
    value = losses.attention_distillation(teachers, students)
    np.testing.assert_allclose(value, CIFAR["akt/refined_fd_loss"][0], rtol=1e-9)
    np.testing.assert_allclose(losses.attention_distillation(teachers, teachers), 0.0, atol=1e-12)


def test_batch_norm_statistics_is_the_mean_over_batch_norms(x64):
    moments = [(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])), (jnp.array([0.0]), jnp.array([3.0]))]
    running = [(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0])), (jnp.array([0.0]), jnp.array([1.0]))]
    np.testing.assert_allclose(losses.batch_norm_statistics(moments, running), ((2.5 + 2.0) + 4.0) / 2)


def test_the_hinge_and_its_gradient_stay_finite_where_teacher_and_student_agree():
    logits = jnp.ones((4, 10))
    value, gradient = jax.value_and_grad(losses.balance_hinge)(logits, logits, 0.1, 0.8)
    chex.assert_tree_all_finite((value, gradient))


def test_the_hinge_finds_its_least_entropy_without_comparing_floats():
    # A value that is computed twice, in differently fused kernels, need not equal itself; a gradient that divides by
    # the number of equal ones is then NaN.
    logits = jnp.arange(40.0).reshape(4, 10) ** 0.5
    program = jax.make_jaxpr(jax.grad(losses.balance_hinge))(logits, logits[::-1], 0.1, 0.8)
    compared = [
        equation
        for equation in program.eqns
        if equation.primitive.name == "eq" and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating)
    ]
    assert not compared


@pytest.mark.slow
def test_the_hinge_over_a_mapped_batch_is_that_of_the_whole(x64):
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.standard_normal((8, 10))) for _ in range(2))
    whole = lambda t: losses.balance_hinge(t, student, 0.3, 0.6)  # noqa: E731
    parts = student.reshape(4, 2, 10)

    def mapped(t):
        part = lambda t, s: losses.balance_hinge(t, s, 0.3, 0.6, axis_name="batch")  # noqa: E731
        return jnp.mean(jax.vmap(part, axis_name="batch")(t.reshape(4, 2, 10), parts))

    np.testing.assert_allclose(mapped(teacher), whole(teacher), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(mapped)(teacher), jax.grad(whole)(teacher), rtol=1e-10, atol=1e-14)
