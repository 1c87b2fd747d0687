"""What people's own models bring: half precision, outputs that are no logits, batch norms and flags by other names."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from granq_jax import Generator, LossSettings, OptimizerSettings, QuantSpec, Trainer, fake_quant, quantize
from granq_jax.data.datasets import load_split
from granq_jax.distill import losses
from granq_jax.distill.joint_run import zero_shot_quantize
from granq_jax.distill.joint_step import apply_with_moments, sample_noise, update
from granq_jax.distill.settings import PretrainSettings
from granq_jax.distill.trainer import evaluation_mode
from granq_jax.quant import in_full_precision
from granq_jax.teachers.training import pretrain
from tests.conftest import one_line_error

SPEC = QuantSpec(weight_bits=3, act_bits=3, placement="operand")
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)), jnp.float32)


class Copied(nn.Module):
    """A batch norm that was copied into a project."""

    mean: str = "mean"
    var: str = "var"

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", self.mean, jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", self.var, jnp.ones, x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        normalised = (x - jnp.expand_dims(mean.value, range(x.ndim - 1))) * jax.lax.rsqrt(
            jnp.expand_dims(var.value, range(x.ndim - 1)) + 1e-5
        )
        return normalised * jnp.expand_dims(scale, range(x.ndim - 1))


class Net(nn.Module):
    dtype: Any = None
    norm: str = "flax"
    output: str = "logits"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, dtype=self.dtype)(x)
        if self.norm == "flax":
            x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        elif self.norm == "inline":
            mean = self.variable("batch_stats", "mean", jnp.zeros, (6,)).value
            var = self.variable("batch_stats", "var", jnp.ones, (6,)).value
            x = (x - mean[None, None, None]) * jax.lax.rsqrt(var + 1e-5)[None, None, None]
        else:
            x = Copied(*self.norm.split(), name="BatchNorm_0")(x)
        features = nn.relu(x).mean((1, 2))
        logits = nn.Dense(10, dtype=self.dtype)(features)
        return {
            "logits": logits,
            "softmax": nn.softmax(logits),
            "sigmoid": nn.sigmoid(logits),
            "log_softmax": nn.log_softmax(logits),
            "tuple": (logits, features),
            "dict": {"logits": logits},
        }[self.output]


def variables_of(model):
    return model.init(jax.random.key(0), IMAGES)


def trainer_of(model, **fields):
    optimizers = OptimizerSettings(steps_per_epoch=2, warmup_epochs=1, student_lr=1e-3)
    settings = {"losses": LossSettings(), "batch_size": 4, "optimizers": optimizers, **fields}
    return Trainer(model=model, generator=Generator(10, 8, 1), spec=SPEC, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_are_computed_in_float32(dtype):
    """On logits of half precision they are those of the same numbers in float32, and so are the gradients."""
    rng = np.random.default_rng(1)
    t, s = (jnp.asarray(4 * rng.standard_normal((6, 10)), dtype) for _ in range(2))
    labels = jnp.arange(6)
    maps = [jnp.asarray(rng.standard_normal((6, 3, 3, 4)), dtype) for _ in range(2)]
    moments = [tuple(jnp.asarray(rng.random(5), dtype) for _ in range(2)) for _ in range(2)]

    def everything(wide):
        def cast(x):
            return x.astype(jnp.float32) if wide else x

        def terms(s):
            a, b = (cast(x) for x in (t, s))
            return {
                "distillation": losses.distillation(a, b, 20.0),
                "labels": losses.label_distillation(a, b, labels, 20.0),
                "discrepancy": losses.discrepancy(a, b, labels),
                "agreement": losses.agreement(a, b, labels),
                "hinge": losses.balance_hinge(a, b, 0.3, 0.5),
                "entropy": losses.entropy(b).mean(),
                "attention": losses.attention_distillation([cast(maps[0])], [cast(maps[1])]),
                "bns": losses.batch_norm_statistics(*([tuple(map(cast, pair))] for pair in moments)),
            }

        return terms(s), jax.jacrev(lambda s: jnp.stack(list(terms(s).values())))(s)

    (narrow, of_narrow), (wide, of_wide) = everything(False), everything(True)
    for name, value in narrow.items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_array_equal(value, wide[name], err_msg=name)
    np.testing.assert_array_equal(of_narrow, of_wide)


@pytest.mark.slow
def test_a_step_of_a_model_in_half_precision_is_near_that_in_float32():
    metrics = {}
    for dtype in (None, jnp.bfloat16):
        trainer = trainer_of(Net(dtype))
        teacher = variables_of(Net())
        state = trainer.init(teacher)
        z, labels = sample_noise(trainer, state.step, jnp.arange(4))
        _, metrics[dtype] = jax.jit(update, static_argnums=(0, 1))(trainer, False, state, teacher, z, labels)
    for name in ("loss_s", "loss_g", "onehot", "bns", "lr_s", "lr_g"):
        assert metrics[jnp.bfloat16][name].dtype == jnp.float32
        assert math.isclose(metrics[None][name], metrics[jnp.bfloat16][name], rel_tol=0.03, abs_tol=0.02), name
    assert metrics[None]["lr_s"] == metrics[jnp.bfloat16]["lr_s"]


@pytest.mark.slow
def test_parameters_in_half_precision_have_masters_that_move():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables_of(Net()))
    moved = {}
    for name, dtype in (("narrow", jnp.bfloat16), ("wide", jnp.float32)):
        teacher = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), narrow)
        student = zero_shot_quantize(trainer_of(Net()), teacher, epochs=2)
        kernel = student["params"]["Conv_0"]["kernel"]
        assert kernel.dtype == jnp.float32
        moved[name] = np.mean(kernel != teacher["params"]["Conv_0"]["kernel"].astype(jnp.float32))
    assert moved["narrow"] > 0.9
    assert moved["wide"] > 0.9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_generator_cannot_learn_in_less_than_float32(dtype):
    with one_line_error(ValueError, "Trainer.dtype", jnp.dtype(dtype).name, "float32"):
        trainer_of(Net(), dtype=dtype)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("softmax", ("probabilities", "softmax", "logits")),
        ("sigmoid", ("probabilities", "sigmoid", "logits")),
        ("tuple", ("tuple", "logits")),
        ("dict", ("dict", "logits")),
    ],
)
def test_what_are_no_logits_is_refused(output, words):
    model = Net(output=output)
    with one_line_error(ValueError, "Trainer.model", "Net", *words):
        zero_shot_quantize(trainer_of(model), variables_of(model), epochs=2)


@pytest.mark.slow
def test_logarithms_of_probabilities_are_logits():
    model = Net(output="log_softmax")
    zero_shot_quantize(trainer_of(model), variables_of(model), epochs=2)


def test_a_single_class_is_refused():
    with one_line_error(ValueError, "Generator.classes", "got 1", "from 2"):
        dataclasses.replace(trainer_of(Net()), generator=Generator(1, 8, 1))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["mean var", "running_mean running_var", "moving_mean moving_variance"])
def test_a_copied_batch_norm_guides_the_generator_as_flax_own(norm):
    model = Net(norm=norm)
    variables = variables_of(model)
    (_, moments), _ = apply_with_moments(quantize(model, in_full_precision(SPEC)), variables, IMAGES)
    of_flax = {**variables, "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}}
    of_flax["params"] = {**variables["params"]}
    of_flax["params"]["BatchNorm_0"] = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    (_, expected), _ = apply_with_moments(quantize(Net(), in_full_precision(SPEC)), of_flax, IMAGES)
    assert jax.tree.structure(moments) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, moments, expected)
    zero_shot_quantize(trainer_of(model), variables, epochs=2)


@pytest.mark.slow
def test_statistics_that_cannot_be_seen_are_named():
    """A block that normalises within itself: what it is called on is not what it normalises."""
    model = Net(norm="inline")
    variables = variables_of(model)
    with one_line_error(ValueError, "LossSettings.gamma", "batch norms", "not seen"):
        zero_shot_quantize(trainer_of(model), variables, epochs=2)
    zero_shot_quantize(trainer_of(model, losses=LossSettings(gamma=0.0)), variables, epochs=2)


class Stacked(nn.Module):
    """Batch norms of which several lie in one array."""

    lift: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3))(x)
        axes = {"params": 0, "batch_stats": 1}
        if self.lift == "scan":
            scanned = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            x, _ = scanned(name="blocks")(x, None)
        elif self.lift == "loop":
            for i in range(2):
                x, _ = Block(name=f"block{i}")(x, None)
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (1, 1))(x))), None


@pytest.mark.slow
def test_batch_norms_in_a_scan_give_the_loss_of_those_in_a_loop(x64):
    rng = np.random.default_rng(2)
    plain = jax.eval_shape(Stacked("loop").init, jax.random.key(0), IMAGES)
    plain = jax.tree.map(lambda leaf: 0.5 + rng.random(leaf.shape), plain)
    stacked = {name: dict(tree) for name, tree in plain.items()}
    for name, tree in stacked.items():
        blocks = [tree.pop(f"block{i}") for i in range(2)]
        axis = 0 if name == "params" else 1
        tree["blocks"] = jax.tree.map(lambda *leaves, axis=axis: np.stack(leaves, axis), *blocks)
    found = []
    for lift, teacher in (("loop", plain), ("scan", stacked)):
        trainer = trainer_of(Stacked(lift), dtype=jnp.float64, losses=LossSettings(attention=10.0))
        teacher = jax.tree.map(jnp.asarray, teacher)
        state = trainer.init(teacher)
        z, labels = sample_noise(trainer, state.step, jnp.arange(4))
        state, metrics = jax.jit(update, static_argnums=(0, 1))(trainer, False, state, teacher, z, labels)
        found.append((metrics, state.generator_opt[0].mu))  # half of the gradients
    for name in ("loss_g", "loss_s", "bns"):
        np.testing.assert_allclose(found[0][0][name], found[1][0][name], rtol=1e-9)
    gradients = [jax.tree.leaves(gradient) for _, gradient in found]
    largest = max(float(jnp.abs(leaf).max()) for leaf in gradients[0])
    for a, b in zip(*gradients, strict=True):  # of a bias before a batch norm they are 0 but for rounding
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9 * largest)


class Flagged(nn.Module):
    def __call__(self, x, *, deterministic, train=True, scale=2.0):
        return x


class Keywords(nn.Module):
    def __call__(self, x, **flags):
        return x if flags.get("is_training", True) else 2 * x


class Needs(nn.Module):
    def __call__(self, x, mask, train):
        return x


def test_the_arguments_of_a_call_to_evaluate():
    assert evaluation_mode(Flagged()) == {"deterministic": True, "train": False}
    assert evaluation_mode(Keywords()) == {"is_training": False}
    assert evaluation_mode(nn.Sequential([nn.relu])) == {}
    with one_line_error(ValueError, "Trainer.model", "Needs", "mask", "deterministic"):
        evaluation_mode(Needs())


class OfNnx(nnx.Module):
    def __call__(self, x):
        return x


@pytest.mark.parametrize("make", [lambda model: quantize(model, SPEC), trainer_of])
def test_models_of_nnx_are_refused_with_what_to_do(make):
    with one_line_error(TypeError, "OfNnx", "nnx", "flax.linen"):
        make(OfNnx())


def test_noise_is_the_same_whatever_generator_is_the_default():
    trainer, noise = trainer_of(Net()), []
    for impl in ("threefry2x32", "rbg"):
        with jax.default_prng_impl(impl):
            noise += [sample_noise(trainer, 3, jnp.arange(n, 8))[0][4 - n :] for n in (0, 4)]
            noise.append(jax.tree.leaves(trainer_of(Net()).init(variables_of(Net())).generator["params"])[0])
    for a, b in ((0, 1), (0, 3), (0, 4), (2, 5)):
        np.testing.assert_array_equal(noise[a], noise[b])


def test_a_map_of_zeros_has_a_finite_gradient():
    zeros, ones = jnp.zeros((2, 3, 3, 4)), jnp.ones((2, 3, 3, 4))
    for teacher in (zeros, ones):
        gradient = jax.grad(lambda s, t=teacher: losses.attention_distillation([t], [s]))(zeros)
        assert jnp.isfinite(gradient).all()


def test_a_kernel_does_not_miss_the_other_devices():
    """A range that is shared over a mapped axis is shared whatever computes it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5)) * np.array([[[1.0]], [[9.0]]]), jnp.float32)
    found = [
        jax.vmap(
            lambda x, impl=impl: fake_quant(x, bits=3, granularity="out_channel", impl=impl, axis_name="devices"),
            axis_name="devices",
        )(x)
        for impl in ("xla", "pallas_interpret")
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("arrays", [(jnp.ones((2, 3)), jnp.ones((2, 3))), {"a": jnp.ones((2, 3))}])
def test_several_arrays_are_not_stacked_into_one(arrays):
    with one_line_error(TypeError, "x", type(arrays).__name__):
        fake_quant(arrays, bits=3)


class Counting(nn.Module):
    """Has a collection of its own, which training does not change."""

    @nn.compact
    def __call__(self, x, training=True):
        offset = self.variable("constants", "offset", lambda: jnp.full((), 0.25)).value
        x = nn.BatchNorm(use_running_average=not training)(x.reshape(x.shape[0], -1) + offset)
        return nn.Dense(10)(x)


@pytest.mark.slow
def test_collections_outlive_the_training_of_a_teacher():
    settings = PretrainSettings(epochs=1, batch_size=256, lr=0.1, weight_decay=0.0, max_shift=0, flip=False, seed=0)
    variables = pretrain(Counting(), load_split("digits", "train"), settings)
    assert set(variables) == {"params", "batch_stats", "constants"}
    assert Counting().apply(variables, IMAGES, training=False).shape == (4, 10)
    student = zero_shot_quantize(trainer_of(Counting()), jax.device_get(variables), epochs=2)
    assert set(student) == {"params", "batch_stats", "constants"}


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(10, kernel_init=init)(x.reshape(x.shape[0], -1))


@pytest.mark.slow
def test_boxes_of_a_teacher_are_those_of_its_student():
    teacher = variables_of(Partitioned())
    student = zero_shot_quantize(trainer_of(Partitioned(), losses=LossSettings(gamma=0.0)), teacher, epochs=2)
    assert student["params"]["Dense_0"]["kernel"].names == (None, "model")
    assert quantize(Partitioned(), SPEC).apply(student, IMAGES).shape == (4, 10)


class Ranges(nn.Module):
    """Calls a collection of its own as earlier versions called theirs."""

    @nn.compact
    def __call__(self, x):
        scale = self.variable("ranges", "x", jnp.ones, (1,)).value + self.variable("average", "x", jnp.ones, (1,)).value
        return nn.Dense(10)(x.reshape(x.shape[0], -1) * scale[None])


@pytest.mark.slow
def test_a_models_own_collections_keep_their_names():
    spec = QuantSpec(placement="operand", act_granularity="tensor", act_ranges="moving_average")
    teacher = variables_of(Ranges())
    trainer = dataclasses.replace(trainer_of(Ranges(), losses=LossSettings(gamma=0.0)), spec=spec)
    trainer = dataclasses.replace(trainer, optimizers=dataclasses.replace(trainer.optimizers, student_ema_decay=0.5))
    student = zero_shot_quantize(trainer, teacher, epochs=2)
    for name in ("ranges", "average"):
        np.testing.assert_array_equal(student[name]["x"], teacher[name]["x"])
    assert set(student) == {*teacher, "granq_ranges"}
