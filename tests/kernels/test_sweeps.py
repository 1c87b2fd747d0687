import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels.sweeps import Quantizer, round_half_to_even


def test_rounding_is_half_to_even():
    v = jnp.array([-2.5, -1.5, -0.5, -0.3, 0.5, 1.5, 2.5, 7.49, 2.0**22 + 0.5, 2.0**23 + 1, 7e8, -7e8, np.inf, -np.inf])
    np.testing.assert_array_equal(round_half_to_even(v), jnp.round(v))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_are_those_of_a_rounding_and_a_clip(bits):
    """Also of values far outside of the range, and in a program, where constants may be put together."""
    values = jnp.linspace(-3.0, 5.0, 4001)[:, None] * jnp.array([[1.0, 1e6, 1e30]])
    low, high, half = -values[-1] / 3, values[-1] / 2, 2 ** (bits - 1)

    @jax.jit
    def found(values, low, high):
        quantizer = Quantizer((low, high), bits)
        codes = quantizer.codes(values)
        return codes.integers, codes.values, quantizer.scale, quantizer.zero

    integers, y, scale, zero = found(values, low, high)
    expected = jnp.clip(jnp.round(scale[None] * values - zero[None]), -half, half - 1)
    np.testing.assert_array_equal(integers, expected)
    np.testing.assert_allclose(y, (expected + zero[None]) / scale[None], rtol=3e-7)
