import jax.numpy as jnp
import numpy as np
from granq_jax.kernels.sweeps import round_half_to_even


def test_rounding_is_half_to_even():
    v = jnp.array([-2.5, -1.5, -0.5, -0.3, 0.5, 1.5, 2.5, 7.49, 2.0**22 + 0.5, 2.0**23 + 1, 7e8, -7e8, np.inf, -np.inf])
    np.testing.assert_array_equal(round_half_to_even(v), jnp.round(v))
