"""The kernel for weights in interpret mode against its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import out_channel

from granq_jax import fake_quant
from tests.kernels.levels import DTYPES, assert_same_levels, normal


@pytest.mark.parametrize(("shape", "dtype"), [((3, 3, 4, 10), "float32"), ((40, 7), "bfloat16")])
def test_values(shape, dtype):
    w = normal(shape, dtype)
    for impl in ("pallas_interpret", "xla"):
        y = fake_quant(w, bits=3, granularity="out_channel", impl=impl)
        assert_same_levels(y[None], out_channel.reference(w, 3)[None], w[None], 3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3, 16, 32), (3, 3, 1, 24), (1, 1, 40, 7), (3, 3, 256, 8), (64, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_more_shapes(shape, dtype):
    test_values(shape, dtype)


def test_gradient():
    w, cotangent = normal((3, 3, 4, 6)), normal((3, 3, 4, 6), seed=1)
    _, pull_back = jax.vjp(lambda w: fake_quant(w, bits=3, granularity="out_channel", impl="pallas_interpret"), w)
    np.testing.assert_array_equal(pull_back(cotangent)[0], cotangent)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_it_lowers_for_gpus(platform):
    w = jax.ShapeDtypeStruct((3, 3, 64, 24), jnp.float32)
    lowered = jax.jit(lambda w: fake_quant(w, bits=3, granularity="out_channel", impl="pallas")).trace(w)
    assert out_channel.NAME in lowered.lower(lowering_platforms=(platform,)).as_text()
