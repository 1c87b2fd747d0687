"""Real images and real teachers; the released code's accuracies before training have nothing random in them."""

import os
import re
from pathlib import Path

import jax
import pytest

import granq_jax.teachers
from granq_jax import Generator, QuantSpec, Trainer, create_model, load_torch
from granq_jax.data import load_split
from granq_jax.evaluate import float_accuracy, student_accuracy

DATA = Path(os.environ.get("GRANQ_JAX_TEST_DATA", "nowhere"))
NAME = "resnet20_cifar10"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason=f"needs tfds/ and {NAME}.npz in $GRANQ_JAX_TEST_DATA"),
]


@pytest.fixture(scope="module")
def real():
    return load_torch(NAME, DATA / f"{NAME}.npz"), load_split("cifar10", "test", os.fspath(DATA / "tfds"))


def test_teacher(real):
    variables, split = real
    evaluate = float_accuracy(create_model(NAME), split, 200, jax.local_devices())
    assert evaluate(variables).top1 == pytest.approx(89.54, abs=0.02)


def test_the_bundled_teacher_is_as_accurate_as_its_card_says(real):
    _, split = real
    bundled = Path(granq_jax.teachers.__file__).parent / "bundled"
    (claimed,) = re.findall(r"top-1 ([\d.]+) %", (bundled / "README.md").read_text())
    evaluate = float_accuracy(create_model(NAME), split, 200, jax.local_devices())
    accuracy = evaluate(load_torch(NAME, bundled / f"{NAME}.safetensors"))
    assert accuracy.top1 == pytest.approx(float(claimed), abs=0.02)
    assert accuracy.top1 >= 91.5


@pytest.mark.parametrize(("granularity", "released"), [("kernel", 86.85), ("out_channel", 82.27)])
def test_student_before_training(real, granularity, released):
    variables, split = real
    trainer = Trainer(model=create_model(NAME), generator=Generator(10), spec=QuantSpec(weight_granularity=granularity))
    accuracy = student_accuracy(trainer, split, 200, jax.local_devices())(variables)
    assert accuracy.top1 == pytest.approx(released, abs=0.1)
