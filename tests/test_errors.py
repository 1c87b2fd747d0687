"""What values of settings are allowed: NumPy's numbers are numbers, too."""

import dataclasses
import fractions
import json

import numpy as np
import pytest

from granq_jax import Generator, LossSettings, OptimizerSettings
from granq_jax.distill.settings import PretrainSettings
from granq_jax.errors import betas, check_fields, decay, increasing_epochs, real, truth, whole
from tests.conftest import one_line_error


@pytest.mark.parametrize("number", [np.int8(3), np.int64(3), np.uint16(3), 3])
def test_whole_numbers_of_every_kind_are_whole(number):
    assert whole(1, 3)[0](number)
    assert not whole(4)[0](number)
    assert real(0)[0](number)
    assert increasing_epochs()[0]((number, 10))


@pytest.mark.parametrize(
    "number", [3.0, np.float32(3), True, np.True_, "3", None, np.array([3]), 3j, fractions.Fraction(3)]
)
def test_what_is_not_whole_is_refused(number):
    assert not whole(1)[0](number)
    assert not increasing_epochs()[0]((number,))


@pytest.mark.parametrize("number", [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), 0, np.int32(0)])
def test_real_numbers_of_every_kind_are_real(number):
    assert real(0, 1)[0](number)
    assert decay()[0](number)
    assert betas()[0]((number, number))


@pytest.mark.parametrize("number", [np.nan, np.float32("inf"), np.float64(-1), True, np.False_, "0.5", np.zeros(1)])
def test_what_is_no_real_number_from_zero_is_refused(number):
    assert not real(0)[0](number)
    assert not decay()[0](number)


def test_truth_values_of_every_kind_are_truth_values():
    assert all(truth()[0](value) for value in (True, np.False_))
    assert not any(truth()[0](value) for value in (0, np.int64(1), "True"))


def test_settings_hold_pythons_numbers():
    """NumPy's would promote what they are multiplied with, and JSON does not know them."""
    optimizers = OptimizerSettings(
        student_lr=np.float64(0.1),
        generator_betas=(np.float32(0.5), 0.9),
        decay_epochs=(np.int64(3),),
        steps_per_epoch=np.int32(7),
    )
    losses = LossSettings(gamma=np.float64(2))
    training = PretrainSettings(
        epochs=np.int64(1),
        batch_size=np.int64(4),
        lr=np.float32(0.5),
        weight_decay=0,
        max_shift=0,
        flip=np.True_,
        seed=0,
    )
    for settings in optimizers, losses, training:
        for value in dataclasses.asdict(settings).values():
            for number in value if isinstance(value, tuple) else (value,):
                assert type(number) in (int, float, bool, str)
        json.dumps(dataclasses.asdict(settings))
    assert (optimizers.student_lr, optimizers.steps_per_epoch, losses.gamma, training.flip) == (0.1, 7, 2.0, True)


def test_a_value_that_is_refused_is_left_as_it_is():
    @dataclasses.dataclass
    class Settings:
        bits: object

    settings = Settings(np.int64(9))
    with one_line_error(ValueError, "Settings.bits", "9", "whole numbers from 2 to 8"):
        check_fields(settings, {"bits": whole(2, 8)})
    assert isinstance(settings.bits, np.int64)


def test_a_generator_takes_numpys_sizes():
    assert Generator(classes=np.int64(10), image_size=np.int32(8), channels=1).image_size == 8
