import pytest

from granq_jax import QuantSpec
from tests.conftest import one_line_error


def test_later_overrides_win_field_by_field():
    spec = QuantSpec(
        weight_bits=3,
        act_bits=3,
        overrides=(("^stage", {"weight_bits": 4, "act_bits": None}), ("conv2", {"weight_bits": 8})),
    )
    assert (spec.at("stem").weight_bits, spec.at("stem").act_bits) == (3, 3)
    assert (spec.at("stage1/conv1").weight_bits, spec.at("stage1/conv1").act_bits) == (4, None)
    assert (spec.at("stage1/conv2").weight_bits, spec.at("stage1/conv2").act_bits) == (8, None)


def test_specs_are_values():
    one, two = (QuantSpec(overrides=(("a", {"act_bits": 4, "weight_bits": 5}),)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (ValueError, ("weight_bits", "1"), {"weight_bits": 1}),
        (TypeError, ("act_bits", "'3'"), {"act_bits": "3"}),
        (ValueError, ("weight_granularity", "sample_channel", "out_channel"), {"weight_granularity": "sample_channel"}),
        (ValueError, ("act_granularity", "'kernel'"), {"act_granularity": "kernel"}),
        (ValueError, ("placement", "'input'", "operand"), {"placement": "input"}),
        (TypeError, ("activation_modules", "'Swish'"), {"activation_modules": "Swish"}),
        (TypeError, ("activation_modules", "3"), {"activation_modules": (3,)}),
        (ValueError, ("activation_modules", "operand"), {"activation_modules": ("A",), "placement": "operand"}),
        (TypeError, ("overrides", "'stem'"), {"overrides": ("stem",)}),
        (ValueError, ("overrides", "regular expression"), {"overrides": (("(", {}),)}),
        (ValueError, ("overrides", "'bits'"), {"overrides": (("stem", {"bits": 4}),)}),
        (ValueError, ("overrides", "weight_bits", "12"), {"overrides": (("stem", {"weight_bits": 12}),)}),
    ],
)
def test_bad_values_are_refused(error, words, kwargs):
    with one_line_error(error, "QuantSpec", *words):
        QuantSpec(**kwargs)
