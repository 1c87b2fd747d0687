"""What is wrong is refused by the library, with an error of one line that names it and says what is allowed."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax import (
    Generator,
    LossSettings,
    OptimizerSettings,
    QuantSpec,
    Trainer,
    create_model,
    dequantize,
    fake_quant,
    load_torch,
    quantize,
    quantize_codes,
    zero_shot_quantize,
)
from granq_jax.data.datasets import load_split
from granq_jax.distill.settings import PretrainSettings
from granq_jax.export import export_program
from granq_jax.teachers import zoo
from granq_jax.teachers.training import pretrain
from tests.conftest import one_line_error
from tests.files.test_tensor_files import state_dict


class NoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Net(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


IMAGES = np.ones((2, 8, 8, 1), np.float32)
OPERAND = QuantSpec(placement="operand")


@functools.cache
def digits():
    return load_split("digits", "train")


@functools.cache
def variables(model):
    return model.init(jax.random.key(0), IMAGES)


def with_nan(tree):
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), tree)


def trainer(**changes):
    parts = {"model": Net(), "generator": Generator(classes=10, image_size=8, channels=1), "spec": OPERAND}
    return Trainer(**{**parts, **changes})


def pretrain_settings(**changes):
    settings = {"epochs": 1, "batch_size": 8, "lr": 0.1, "weight_decay": 0.0, "max_shift": 1, "flip": False, "seed": 0}
    return PretrainSettings(**{**settings, **changes})


def quantized(images=IMAGES, model=None, **fields):
    model = Net() if model is None else model
    return quantize(model, QuantSpec(**fields)).apply(variables(model), images)


def shot(teacher=None, epochs=9, **changes):
    model = Net()
    return zero_shot_quantize(trainer(**changes), variables(model) if teacher is None else teacher, epochs=epochs)


X = np.ones((2, 4, 4, 3), np.float32)

MAX_SECONDS = 5

# By name: what is called, the error, words of its message.
LIBRARY = {
    "array of integers": (lambda: fake_quant(X.astype(int), bits=3), TypeError, ("x", "int", "floating")),
    "array of truth values": (lambda: fake_quant(X > 0, bits=3), TypeError, ("x", "bool", "floating")),
    "array of complex numbers": (lambda: fake_quant(X * 1j, bits=3), TypeError, ("x", "complex64", "floating")),
    "no array": (lambda: fake_quant("x", bits=3), TypeError, ("x", "str", "floating")),
    "ragged array": (lambda: fake_quant([[1.0], [1.0, 2.0]], bits=3), TypeError, ("x", "list", "floating")),
    "array of rank 1": (lambda: fake_quant(X[0, 0, 0], bits=3), ValueError, ("1 dimensions", "2 or more")),
    "array of rank 0": (lambda: fake_quant(jnp.float32(1), bits=3), ValueError, ("0 dimensions", "2 or more")),
    "codes of integers": (lambda: quantize_codes(X.astype(int), bits=3), TypeError, ("x", "int", "floating")),
    "codes of bits 9": (lambda: quantize_codes(X, bits=9), ValueError, ("bits", "9", "2 to 8")),
    "codes that are none": (lambda: dequantize(X), TypeError, ("q", "ndarray", "QuantizedArray")),
    "bits 0": (lambda: fake_quant(X, bits=0), ValueError, ("bits", "0", "2 to 8")),
    "bits 1": (lambda: fake_quant(X, bits=1), ValueError, ("bits", "1", "2 to 8")),
    "bits negative": (lambda: fake_quant(X, bits=-3), ValueError, ("bits", "-3", "2 to 8")),
    "bits fractional": (lambda: fake_quant(X, bits=3.0), TypeError, ("bits", "3.0", "2 to 8")),
    "bits true": (lambda: fake_quant(X, bits=True), TypeError, ("bits", "True", "2 to 8")),
    "bits as text": (lambda: fake_quant(X, bits="3"), TypeError, ("bits", "'3'", "2 to 8")),
    "bits as an array": (lambda: fake_quant(X, bits=jnp.array([3])), TypeError, ("bits", "2 to 8")),
    "unknown granularity": (lambda: fake_quant(X, bits=3, granularity="pixel"), ValueError, ("'pixel'", "'sample'")),
    "unknown implementation": (lambda: fake_quant(X, bits=3, impl="c"), ValueError, ("impl", "'c'", "'xla'")),
    "spec with bits 9": (lambda: QuantSpec(act_bits=9), ValueError, ("QuantSpec.act_bits", "9", "2 to 8")),
    "spec with an expression that is none": (
        lambda: QuantSpec(overrides=(("(", {"act_bits": 3}),)),
        *(ValueError, ("QuantSpec.overrides", "'('", "regular expression")),
    ),
    "spec with a number for overrides": (
        lambda: QuantSpec(overrides=3),
        *(TypeError, ("QuantSpec.overrides", "3", "regular expression")),
    ),
    "spec with an override without fields": (
        lambda: QuantSpec(overrides=(("a", ("act_bits",)),)),
        *(TypeError, ("QuantSpec.overrides", "'act_bits'", "dict of fields")),
    ),
    "spec with an override of no field": (
        lambda: QuantSpec(overrides=(("a", {3: 4, "b": 5}),)),
        *(ValueError, ("QuantSpec.overrides", "3", "'act_bits'")),
    ),
    "spec with a number for modules": (
        lambda: QuantSpec(activation_modules=3),
        *(TypeError, ("QuantSpec.activation_modules", "3", "tuple of classes")),
    ),
    "placement that matches nothing": (
        lambda: quantized(),
        *(ValueError, ("QuantSpec.placement", "'activation'", "matches nothing", "Conv_0, Dense_0")),
    ),
    "modules that match nothing": (
        lambda: quantized(activation_modules=("Swish",)),
        *(ValueError, ("QuantSpec", "matches nothing", "Conv_0")),
    ),
    "override that matches nothing": (
        lambda: quantized(placement="operand", overrides=(("^stem", {"weight_bits": 8}),)),
        *(ValueError, ("QuantSpec.overrides", "'^stem'", "Conv_0, Dense_0")),
    ),
    "model without weights": (
        lambda: quantize(NoLayers(), OPERAND).apply({"params": {}}, IMAGES),
        *(ValueError, ("QuantSpec.weight_bits", "NoLayers", "no parameter named 'kernel'")),
    ),
    "integer images": (lambda: quantized(IMAGES.astype(np.uint8), placement="operand"), TypeError, ("x", "uint8")),
    "no model": (lambda: quantize(Net, OPERAND), TypeError, ("model", "flax.linen.Module")),
    "no spec": (lambda: quantize(Net(), {"act_bits": 3}), TypeError, ("spec", "dict", "QuantSpec")),
    "unknown network": (lambda: create_model("resnet21"), ValueError, ("network", "'resnet21'", "resnet20_cifar10")),
    "network that is a list": (lambda: create_model(["resnet18"]), ValueError, ("network", "['resnet18']", "resnet18")),
    "checkpoint that is none": (lambda: zoo.fetch(None), ValueError, ("config.teacher", "None", "resnet18")),
    "tensor that is no array": (
        lambda: load_torch("resnet8_digits", {**state_dict(), "output.bias": [[1.0], [1.0, 2.0]]}),
        *(ValueError, ("teacher", "output.bias", "list")),
    ),
    "unknown data set": (lambda: load_split("mnist", "test"), ValueError, ("dataset", "'mnist'", "'digits'")),
    "unknown split": (lambda: load_split("digits", "val"), ValueError, ("split", "'val'", "'train'")),
    "training in batches of 0": (
        lambda: pretrain_settings(batch_size=0),
        *(ValueError, ("PretrainSettings.batch_size", "0", "from 2")),
    ),
    "training on windows of 0 pixels": (
        lambda: pretrain_settings(small_size=0),
        *(ValueError, ("PretrainSettings.small_size", "0", "from 1")),
    ),
    "training on windows larger than the images": (
        lambda: pretrain(Net(), digits(), pretrain_settings(small_epochs=1, small_size=9)),
        *(ValueError, ("PretrainSettings.small_size", "9", "8 pixels")),
    ),
    "training in batches larger than the data": (
        lambda: pretrain(Net(), digits(), pretrain_settings(batch_size=2000)),
        *(ValueError, ("PretrainSettings.batch_size", "2000", "1437")),
    ),
    "program with kernels for CPUs": (
        lambda: export_program(Net(), OPERAND, variables(Net()), (8, 8, 1), batch_size=2, impl="pallas"),
        *(ValueError, ("platforms", "'cpu'", "('cuda',)")),
    ),
    "program that decides later": (
        lambda: export_program(Net(), OPERAND, variables(Net()), (8, 8, 1), impl="auto"),
        *(ValueError, ("impl", "'auto'", "'xla', 'pallas'")),
    ),
    "generator of no classes": (lambda: Generator(classes=0), ValueError, ("Generator.classes", "0", "from 1")),
    "generator of odd size": (
        lambda: Generator(classes=10, image_size=30),
        *(ValueError, ("Generator.image_size", "30", "multiples of 4")),
    ),
    "generator of 2 channels": (
        lambda: Generator(classes=10, channels=2),
        *(ValueError, ("Generator.channels", "2", "1 and 3")),
    ),
    "trainer with batches of 1": (lambda: trainer(batch_size=1), ValueError, ("Trainer.batch_size", "1", "from 2")),
    "trainer without a model": (lambda: trainer(model=Net), TypeError, ("Trainer.model", "Module")),
    "trainer with a dict for losses": (
        lambda: trainer(losses={}),
        *(TypeError, ("Trainer.losses", "dict", "LossSettings")),
    ),
    "trainer with an unknown implementation": (
        lambda: trainer(impl="c"),
        *(ValueError, ("Trainer.impl", "'c'", "'xla'")),
    ),
    "rate NaN": (
        lambda: OptimizerSettings(student_lr=float("nan")),
        *(ValueError, ("OptimizerSettings.student_lr", "nan", "finite")),
    ),
    "rate as text": (
        lambda: OptimizerSettings(generator_lr="0.1"),
        *(ValueError, ("OptimizerSettings.generator_lr", "'0.1'", "finite")),
    ),
    "decays that fall": (
        lambda: OptimizerSettings(decay_epochs=(3, 2)),
        *(ValueError, ("OptimizerSettings.decay_epochs", "(3, 2)", "increasing")),
    ),
    "weight of a loss NaN": (
        lambda: LossSettings(gamma=float("nan")),
        *(ValueError, ("LossSettings.gamma", "nan", "finite")),
    ),
    "bounds of the hinge crossed": (
        lambda: LossSettings(lambda_lower=0.9),
        *(ValueError, ("LossSettings.lambda_lower", "0.9", "up to LossSettings.lambda_upper, 0.8")),
    ),
    "no epoch after the warm-up": (lambda: shot(epochs=4), ValueError, ("epochs", "4", "warm-up's 4")),
    "teacher without parameters": (lambda: shot({"batch_stats": {}}), ValueError, ("teacher", "'params'")),
    "teacher of another model": (lambda: shot({"params": {}}), ValueError, ("teacher", "model", "Conv_0")),
    "teacher with NaN": (
        lambda: shot(with_nan(variables(Net()))),
        *(ValueError, ("teacher", "params/Conv_0/bias", "NaN", "finite")),
    ),
    "classes that disagree": (
        lambda: shot(generator=Generator(classes=7, image_size=8, channels=1)),
        *(ValueError, ("Generator.classes", "7", "(2, 10)")),
    ),
    "channels that disagree": (
        lambda: shot(generator=Generator(classes=10, image_size=8)),
        *(ValueError, ("teacher", "(2, 8, 8, 3)")),
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_refuses(name):
    call, error, words = LIBRARY[name]
    variables(Net()), digits()  # made once, which takes longer than any refusal
    start = time.monotonic()
    with one_line_error(error, *words):
        call()
    assert time.monotonic() - start < MAX_SECONDS
