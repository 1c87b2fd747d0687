"""L_G and L_S of each method, and the gradient by which the student learns from them."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax import LossSettings, OptimizerSettings, QuantSpec, Trainer, create_model
from granq_jax.distill import joint_step as joint
from granq_jax.distill import losses
from granq_jax.distill.objectives import feature_maps, generator_loss, student_loss
from granq_jax.models import Generator
from granq_jax.quant import RANGES, in_full_precision, quantize
from tests.conftest import one_line_error


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), rng.integers(0, 5, 6)


def cross_entropy(logits, labels):
    return -np.mean(np.log(softmax(logits))[np.arange(len(labels)), labels])


def test_gdfq(x64, logits):
    t, s, labels = logits
    settings = LossSettings(objective="gdfq", gamma=0.1, beta=0.7)
    moments = {"bn": {"mean": (np.array([1.0, 2.0]),), "var": (np.array([1.0, 1.0]),)}}
    running = {"bn": {"mean": np.array([0.0, 0.0]), "var": np.array([1.0, 3.0])}}
    value, terms = generator_loss(settings, t, moments, s, labels, running)
    np.testing.assert_allclose(terms["onehot"], cross_entropy(t, labels), rtol=1e-12)
    np.testing.assert_allclose(value, 0.7 * cross_entropy(t, labels) + 0.1 * (2.5 + 2.0), rtol=1e-12)
    assert terms["hinge"] == 0

    p, q = softmax(t / 20), softmax(s / 20)
    expected = 20**2 * np.mean(p * (np.log(p) - np.log(q))) + cross_entropy(s, labels)
    np.testing.assert_allclose(student_loss(settings, t, s, labels, (), ()), expected, rtol=1e-12)


def test_attention_is_added_with_its_weight(x64, logits):
    t, s, labels = logits
    maps = [jax.random.normal(jax.random.key(i), (6, 4, 4, 3), jnp.float64) for i in (0, 1)]
    plain = student_loss(LossSettings(), t, s, labels, maps[:1], maps[1:])
    np.testing.assert_allclose(plain, losses.distillation(t, s, 20.0))
    with_it = student_loss(LossSettings(attention=30.0), t, s, labels, maps[:1], maps[1:])
    np.testing.assert_allclose(with_it - plain, losses.attention_distillation(maps[:1], maps[1:], weight=30.0))


@pytest.mark.parametrize("settings", [LossSettings(attention=30.0), LossSettings(objective="gdfq", attention=30.0)])
def test_the_mean_over_devices_is_that_of_the_whole_batch(x64, logits, settings):
    t, s, labels = logits
    of_teacher, of_student = (jax.random.normal(jax.random.key(i), (6, 4, 4, 3), jnp.float64) for i in (0, 1))
    whole = student_loss(settings, t, s, labels, [of_teacher], [of_student])

    def part(t, s, labels, a, b):
        return jax.lax.pmean(student_loss(settings, t, s, labels, [a], [b], axis_name="batch"), "batch")

    split = [x.reshape(2, 3, *x.shape[1:]) for x in (t, s, labels, of_teacher, of_student)]
    np.testing.assert_allclose(jax.vmap(part, axis_name="batch")(*split), whole, rtol=1e-12)


@pytest.fixture(scope="module")
def digits():
    model = create_model("resnet8_digits")
    trainer = Trainer(
        model=model,
        generator=Generator(classes=10, image_size=8, channels=1),
        spec=QuantSpec(act_granularity="tensor", act_ranges="moving_average"),
        losses=LossSettings(attention=1000.0),
        optimizers=OptimizerSettings(student_momentum=0.0, student_weight_decay=0.0, student_lr=1.0, warmup_epochs=1),
        batch_size=4,
    )
    teacher = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return trainer, jax.device_get(teacher)


@pytest.mark.slow
def test_the_student_descends_its_whole_loss(x64, digits):
    trainer, teacher = digits
    trainer = dataclasses.replace(trainer, dtype=jnp.float64)
    teacher = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), teacher)
    state = trainer.init(teacher)
    z, labels = joint.sample_noise(trainer, state.step, jnp.arange(4))
    update = jax.jit(joint.update, static_argnums=(0, 1))
    warm, _ = update(trainer, True, state, teacher, z, labels)
    after, metrics = update(trainer, False, warm, teacher, z, labels)

    images, _ = trainer.generator.apply(warm.generator, z, labels, mutable=["batch_stats"])
    in_full = quantize(trainer.model, in_full_precision(trainer.spec))
    t, of_teacher = in_full.apply_with_activations(teacher, images, train=False)

    def loss(params):
        variables = {**warm.student, "params": params}
        s, of_student = quantize(trainer.model, trainer.spec).apply_with_activations(variables, images, train=False)
        maps = feature_maps(of_teacher), feature_maps(of_student)
        return losses.distillation(t, s, 20.0) + losses.attention_distillation(*maps, weight=1000.0)

    value, gradient = jax.jit(jax.value_and_grad(loss))(warm.student["params"])
    np.testing.assert_allclose(metrics["loss_s"], value, rtol=1e-9)
    # Without momentum and decay, and at a rate of 1, what the student moves by is the gradient.
    moved = jax.tree.map(jnp.subtract, warm.student["params"], after.student["params"])
    for ours, theirs in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9 * float(jnp.abs(theirs).max()) + 1e-14)


@pytest.mark.slow
def test_ranges_move_in_the_warm_up_alone(digits):
    trainer, teacher = digits
    state = trainer.init(teacher)
    assert all(low.item() < high.item() for low, high in jax.tree.leaves(state.student[RANGES]))
    z, labels = joint.sample_noise(trainer, state.step, jnp.arange(4))
    update = jax.jit(joint.update, static_argnums=(0, 1))
    ranges = [state.student[RANGES]]
    for warmup in (True, True, False):
        state, _ = update(trainer, warmup, state, teacher, z, labels)
        ranges.append(state.student[RANGES])
    for before, after in itertools.pairwise(ranges[:3]):
        assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    jax.tree.map(np.testing.assert_array_equal, ranges[2], ranges[3])


def test_kept_ranges_need_a_warm_up(digits):
    trainer, _ = digits
    with one_line_error(ValueError, "warmup_epochs", "0", "moving_average"):
        dataclasses.replace(trainer, optimizers=OptimizerSettings(warmup_epochs=0))
    with one_line_error(ValueError, "LossSettings.objective", "'gan'", "adadfq"):
        LossSettings(objective="gan")


@pytest.mark.slow
def test_devices_share_ranges_and_gradients(x64, digits):
    """Two shares of a batch under a mapped axis take the steps that the whole batch takes."""
    trainer, teacher = digits
    trainer = dataclasses.replace(trainer, dtype=jnp.float64)
    # Fresh batch norms are identities: many activations then lie exactly between two levels.
    rng = np.random.default_rng(1)
    teacher = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.random(leaf.shape)), teacher)
    whole = shared = trainer.init(teacher)
    for warmup in (True, False):
        z, labels = joint.sample_noise(trainer, whole.step, jnp.arange(4))
        take = partial(joint.update, trainer, warmup)
        mapped = jax.vmap(partial(take, axis_name="devices"), in_axes=(None, None, 0, 0), axis_name="devices")
        copies, metrics = jax.jit(mapped)(shared, teacher, z.reshape(2, 2, -1), labels.reshape(2, 2))
        whole, expected = jax.jit(take)(whole, teacher, z, labels)
        shared = jax.tree.map(lambda leaf: leaf[0], copies)
        for name in ("loss_g", "loss_s"):
            np.testing.assert_allclose(metrics[name], jnp.stack([expected[name]] * 2), rtol=1e-9)
    for ours, theirs in zip(jax.tree.leaves(shared.student), jax.tree.leaves(whole.student), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9 * float(jnp.abs(theirs).max()))
