import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granq_jax import Generator, LossSettings, OptimizerSettings, QuantSpec, Trainer, create_model
from granq_jax.distill.joint_run import JointRun, NonFinite, NonFiniteError, zero_shot_quantize
from granq_jax.distill.joint_step import CHECKED, mapped_step, sample_noise, update
from granq_jax.runtime.devices import place
from tests.conftest import one_line_error

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def teacher():
    return jax.jit(create_model("resnet8_digits").init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))


def make_trainer(**changes):
    settings = {
        "model": create_model("resnet8_digits"),
        "generator": Generator(10, 8, 1),
        "spec": QuantSpec(),
        "optimizers": OptimizerSettings(steps_per_epoch=2, warmup_epochs=1, student_lr=1e-3),
        "batch_size": 4,
    }
    return Trainer(**{**settings, **changes})


@pytest.fixture
def compilations():
    """Counts what XLA compiles from now on."""
    names = []

    def listener(event, duration, **_):
        if event == COMPILED:
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)


def test_the_first_state_is_traced_once_for_its_shapes_and_itself(teacher, monkeypatch):
    traced = []
    plain = Trainer._first_state
    monkeypatch.setattr(Trainer, "_first_state", lambda self, *args: traced.append(self) or plain(self, *args))
    trainer = make_trainer()
    shapes = trainer.state_shapes(teacher)
    chex.assert_trees_all_equal_shapes_and_dtypes(trainer.init(teacher), shapes)
    assert traced == [trainer]


@pytest.mark.slow
def test_each_phase_compiles_once_and_moves_nothing_but_metrics(teacher, compilations):
    run = JointRun(make_trainer(), teacher, jax.local_devices())
    compilations.clear()
    for warmup in (True, False):
        run.advance(warmup)  # the first step of a phase compiles it
        assert compilations
        compilations.clear()
        for _ in range(4):
            with jax.transfer_guard("disallow_explicit"):
                metrics = run.advance(warmup)
            chex.assert_tree_all_finite(jax.device_get(metrics))
        assert not compilations
    assert int(run.state.step) == 10


@pytest.mark.slow
def test_only_the_generator_moves_in_the_warm_up(teacher):
    run = JointRun(make_trainer(), teacher, jax.local_devices())
    generator = jax.device_get(run.state.generator["params"])
    run.advance(warmup=True)
    chex.assert_trees_all_equal(jax.device_get(run.state.student), jax.device_get(teacher))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), generator, jax.device_get(run.state.generator["params"]))
    assert all(jax.tree.leaves(moved))
    run.advance(warmup=False)
    chex.assert_trees_all_equal(run.state.student["batch_stats"], jax.device_get(teacher["batch_stats"]))
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), teacher["params"], jax.device_get(run.state.student["params"])
    )
    assert all(jax.tree.leaves(moved))


def test_zero_shot_quantize_returns_the_students_variables(teacher):
    student = zero_shot_quantize(make_trainer(), teacher, epochs=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(student, jax.device_get(teacher))
    chex.assert_tree_all_finite(student)


@pytest.mark.slow
def test_a_moving_average_of_the_student_is_what_a_run_gives(teacher):
    decay = 0.75

    def run_of(decay):
        settings = OptimizerSettings(steps_per_epoch=2, warmup_epochs=1, student_lr=1e-3, student_ema_decay=decay)
        return JointRun(make_trainer(optimizers=settings), teacher, jax.local_devices())

    plain, run = run_of(0.0), run_of(decay)
    expected = jax.tree.map(np.asarray, teacher["params"])
    for step in range(5):
        plain.advance(warmup=step < 2)
        run.advance(warmup=step < 2)
        params = jax.device_get(run.state.student["params"])
        if step >= 2:
            expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, params)
        result = jax.device_get(run.state.result)
        chex.assert_trees_all_close(result["params"], expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(params, jax.device_get(plain.state.student["params"]))  # which learn as without it
    chex.assert_trees_all_equal(plain.state.result, plain.state.student)
    chex.assert_trees_all_equal_structs(result, plain.state.student)
    chex.assert_trees_all_equal(result["batch_stats"], jax.device_get(teacher["batch_stats"]))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), result["params"], params)))


def test_noise_depends_on_seed_step_and_index_only(x64):
    trainer = make_trainer()
    z, labels = sample_noise(trainer, 3, jnp.arange(8))
    assert z.shape == (8, 100)
    assert z.dtype == jnp.float32
    part_z, part_labels = sample_noise(trainer, 3, jnp.array([6, 2]))
    np.testing.assert_array_equal(part_z, z[jnp.array([6, 2])])
    np.testing.assert_array_equal(part_labels, labels[jnp.array([6, 2])])
    for other in (sample_noise(trainer, 4, jnp.arange(8)), sample_noise(make_trainer(seed=1), 3, jnp.arange(8))):
        assert not np.any(np.isclose(other[0], z).all(axis=1))
    many = sample_noise(trainer, 0, jnp.arange(4000))
    np.testing.assert_allclose([many[0].mean(), many[0].std()], [0, 1], atol=0.01)
    np.testing.assert_allclose(np.bincount(many[1], minlength=10) / 4000, 0.1, atol=0.02)


@pytest.mark.slow
def test_a_teacher_without_batch_norm_is_refused_unless_bns_is_off():
    import dataclasses

    import flax.linen as nn

    from granq_jax import Activation, LossSettings

    model = nn.Sequential([nn.Conv(4, (3, 3)), Activation(), lambda x: x.mean((1, 2)), nn.Dense(10)])
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    trainer = dataclasses.replace(make_trainer(), model=model)
    with one_line_error(ValueError, "LossSettings.gamma", "1.0", "no batch norm"):
        JointRun(trainer, variables, jax.local_devices()).advance(warmup=True)
    without = dataclasses.replace(trainer, losses=LossSettings(gamma=0.0))
    metrics = JointRun(without, variables, jax.local_devices()).advance(warmup=True)
    assert float(metrics["bns"]) == 0.0


def test_a_generator_for_another_number_of_classes_is_refused(teacher):
    run = JointRun(make_trainer(generator=Generator(11, 8, 1)), teacher, jax.local_devices())
    with one_line_error(ValueError, "Generator.classes", "11", "(4, 10)"):
        run.advance(warmup=True)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 1}, {"latent": 0}, {"seed": -1}, {"batch_size": 4.0}, {"on_nonfinite": "go"}, {"precision": "fp8"}],
)
def test_bad_trainers_are_refused(changes):
    ((field, value),) = changes.items()
    with one_line_error(ValueError, f"Trainer.{field}", str(value)):
        make_trainer(**changes)


def spoiled(state, part):
    """``state`` with infinity in all numbers of ``part``, counters left alone."""
    infinite = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.inf) if jnp.issubdtype(x.dtype, jnp.inexact) else x, getattr(state, part)
    )
    return place(state.replace(**{part: infinite}), jax.local_devices())


def test_a_step_that_is_not_finite_is_named(teacher):
    run = JointRun(make_trainer(), teacher, jax.local_devices())
    run.advance(warmup=True)
    run.state = spoiled(run.state, "generator")
    metrics = jax.device_get(run.advance(warmup=True))
    run.advance(warmup=True)
    term = next(name for name in CHECKED if not np.isfinite(metrics[name]))
    with one_line_error(NonFiniteError, f"step 2: the loss term {term} is not finite"):
        run.check()
    assert run.check() == []


def test_a_parameter_that_is_not_finite_is_named(teacher):
    run = JointRun(make_trainer(), teacher, jax.local_devices())
    run.advance(warmup=True)
    run.state = spoiled(run.state, "student_opt")
    metrics = jax.device_get(run.advance(warmup=False))
    assert np.isfinite(list(metrics.values())).all()
    with one_line_error(NonFiniteError, "step 2: a parameter of the student is not finite"):
        run.check()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(teacher):
    run = JointRun(make_trainer(on_nonfinite="skip"), teacher, jax.local_devices())
    run.advance(warmup=False)
    assert run.check() == []
    run.state = spoiled(run.state, "student_opt")
    before = jax.device_get(run.state)
    run.advance(warmup=False)
    assert run.check() == [NonFinite(2, "a parameter of the student is")]
    after = jax.device_get(run.state)
    assert after.step == before.step + 1 == 2
    for name in ("generator", "student"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    moments = [optax.tree.get(state.generator_opt, "mu") for state in (before, after)]
    chex.assert_trees_all_equal(*moments)
    assert run.check() == []


@pytest.mark.slow
def test_steps_go_on_from_a_state(teacher):
    trainer = make_trainer()
    whole = JointRun(trainer, teacher, jax.local_devices())
    whole.advance(warmup=True)
    half = jax.tree.map(np.array, jax.device_get(whole.state))
    whole.advance(warmup=False)
    rest = JointRun(trainer, teacher, jax.local_devices(), half)
    assert rest.step == 1
    rest.advance(warmup=False)
    assert rest.step == whole.step == 2
    chex.assert_trees_all_equal(jax.device_get(rest.state), jax.device_get(whole.state))


@pytest.mark.slow
def test_a_generator_that_does_not_look_at_the_student_takes_the_same_step(x64, teacher):
    """The way through the student is left out where its weight is 0; with a weight of nearly 0 it is not."""
    teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), teacher)
    z, labels = jax.random.normal(jax.random.key(1), (4, 100), jnp.float64), jnp.arange(4)
    after = {}
    for alpha_as in (0.0, 1e-300):
        losses = LossSettings(hinge=0.0, alpha_ds=0.0, alpha_as=alpha_as, alpha_label=1.0, gamma=10.0)
        trainer = make_trainer(losses=losses, dtype=jnp.float64)
        assert losses.watches_student == bool(alpha_as)
        state = trainer.init(teacher)
        after[alpha_as], _ = jax.jit(update, static_argnums=(0, 1))(trainer, False, state, teacher, z, labels)
    chex.assert_trees_all_close(after[0.0], after[1e-300], rtol=1e-9, atol=1e-12)


def test_the_cosine_ends_at_zero_and_leaves_the_generator_alone():
    settings = OptimizerSettings(
        steps_per_epoch=10, warmup_epochs=2, cosine_epochs=6, decay_epochs=(), student_lr=0.5, generator_lr=0.1
    )
    trainer = make_trainer(optimizers=settings)
    steps = np.arange(61)
    expected = 0.25 * (1 + np.cos(np.pi * np.clip((steps - 20) / 40, 0, 1)))
    np.testing.assert_allclose([trainer.student_schedule(step) for step in steps], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose([trainer.generator_schedule(step) for step in steps], 0.1, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_student_learns_at_the_rate_that_is_logged(x64, optimizer):
    """The optimizer counts its own steps, which begin after the warm-up."""
    settings = OptimizerSettings(
        student_optimizer=optimizer, steps_per_epoch=2, warmup_epochs=1, cosine_epochs=4, student_weight_decay=0.0
    )
    trainer = make_trainer(optimizers=settings)
    params, gradient = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    state = trainer.student_optimizer.init(params)
    for step in range(2, 8):
        updates, state = trainer.student_optimizer.update(gradient, state, params)
        rate = float(trainer.student_schedule(step))
        # Of a gradient that is always 1 both of Adam's moments are 1.
        momentum = 1.0 if optimizer == "adam" else 1 + 0.9 * sum(0.9**k for k in range(step - 1))
        np.testing.assert_allclose(updates["w"], -rate * momentum, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student_optimizer": "rmsprop"}, ("student_optimizer", "'rmsprop'", "'adam'")),
        ({"cosine_epochs": 1, "warmup_epochs": 1}, ("cosine_epochs", "warmup_epochs, 1")),
    ],
)
def test_optimizer_settings_that_are_refused(changes, words):
    with one_line_error(ValueError, *words):
        OptimizerSettings(**changes)


def test_the_cosine_ends_with_the_run(teacher):
    trainer = make_trainer(optimizers=OptimizerSettings(steps_per_epoch=2, warmup_epochs=1, cosine_epochs=3))
    with one_line_error(ValueError, "epochs: got 4", "cosine_epochs, 3"):
        zero_shot_quantize(trainer, teacher, epochs=4)


@pytest.mark.parametrize(("precision", "stated"), [("float32", "HIGHEST"), ("tf32", "HIGH"), ("default", "DEFAULT")])
def test_all_products_of_a_step_are_of_the_trainers_precision(teacher, precision, stated):
    state = make_trainer().state_shapes(teacher)
    index = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    for each in ("float32", precision):  # traces of one precision are not taken for those of another
        text = (
            mapped_step(make_trainer(precision=each), False, jax.local_devices()).lower(state, teacher, index).as_text()
        )
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)]
    assert len(products) > 20
    for line in products:
        assert set(re.findall(r"\b(?:DEFAULT|HIGHEST|HIGH)\b", line)) <= {stated}, line
        assert stated in line or stated == "DEFAULT"  # which may be left unsaid


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_several_steps_in_a_program_are_those_one_by_one(warmup, teacher, x64):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), teacher)
    one_by_one, together = (JointRun(make_trainer(dtype=jnp.float64), wide, jax.local_devices()) for _ in range(2))
    for _ in range(3):
        metrics = one_by_one.advance(warmup)
    last = together.advance(warmup, steps=3)
    assert together.step == int(together.state.step) == 3
    chex.assert_trees_all_close(jax.device_get(last), jax.device_get(metrics), rtol=1e-9)
    # Biases before a batch norm have gradients of nothing but rounding, which Adam enlarges.
    chex.assert_trees_all_close(jax.device_get(together.state), jax.device_get(one_by_one.state), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_steps_in_a_program_that_are_not_finite_are_told_by_their_numbers(teacher):
    run = JointRun(make_trainer(on_nonfinite="skip"), teacher, jax.local_devices())
    run.advance(warmup=True)
    run.state = spoiled(run.state, "generator")
    run.advance(warmup=True, steps=2)
    assert [found.step for found in run.check()] == [2, 3]
    assert not run.check()
