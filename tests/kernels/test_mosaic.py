"""The kernel on Mosaic GPU in interpret mode against the reference of Triton's; its lowering."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import mosaic, sample_channel

from granq_jax import fake_quant
from granq_jax.quant import dispatch
from tests.kernels.levels import DTYPES, assert_same_levels, normal

needs_jax = pytest.mark.skipif(jax.__version_info__ < mosaic.LEAST_JAX, reason="Mosaic GPU lacks what is needed")


def lowered(function, shape, dtype="float32"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.jit(function).trace(x).lower(lowering_platforms=("cuda",)).as_text()


@needs_jax
@pytest.mark.parametrize(
    ("shape", "dtype", "bits"),
    [
        ((2, 7, 7, 64), "float32", 3),  # tiles that overlap
        ((2, 8, 8, 64), "bfloat16", 2),
        ((1, 8, 16, 16), "float16", 8),
        ((1, 40, 30, 8), "float32", 3),  # two sweeps, the last tile overlaps
        ((1, 32, 64, 8), "float32", 3),  # two sweeps
    ],
)
def test_values(shape, dtype, bits):
    x = normal(shape, dtype)
    y = mosaic.fake_quant(x, bits, interpret=True)
    assert_same_levels(y, sample_channel.reference(x, bits), x, bits)


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (1, 14, 14, 96), (1, 56, 56, 48), (1, 130, 129, 16), (3, 512, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_more_shapes(shape, dtype):
    test_values(shape, dtype, 3)


@needs_jax
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (1, 40, 30, 8)])
def test_a_bad_value_spoils_its_own_channel_only(shape, bad):
    kernel = jax.jit(partial(mosaic.fake_quant, bits=3, interpret=True))
    x = np.array(normal(shape))
    x[..., 1] = 0.7
    clean = np.array(kernel(jnp.asarray(x)))
    np.testing.assert_allclose(clean[..., 1], 0.7, rtol=1e-6)
    x[0, -1, 0, 3] = bad
    y = np.array(kernel(jnp.asarray(x)))
    assert not np.isfinite(y[0, ..., 3]).any()
    y[0, ..., 3] = clean[0, ..., 3]
    np.testing.assert_array_equal(y, clean)


@needs_jax
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (1, 112, 112, 64)])
def test_it_lowers_without_a_gpu(shape, dtype):
    text = lowered(partial(mosaic.fake_quant, bits=3), shape, dtype)
    assert "mosaic_gpu_v2" in text
    assert mosaic.NAME in text


@needs_jax
def test_it_is_chosen_in_one_place(monkeypatch):
    plain = partial(fake_quant, bits=3, impl="pallas")
    assert "mosaic" not in lowered(plain, (2, 9, 7, 64))
    monkeypatch.setattr(dispatch, "_PLAIN", "mosaic")
    jax.clear_caches()
    assert "mosaic_gpu_v2" in lowered(plain, (2, 9, 7, 64))
    assert "triton" in lowered(plain, (2, 9, 7, 3))  # which it does not cover


def test_what_it_does_not_cover_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with pytest.raises(NotImplementedError, match="1 pixels of 64 channels"):
        mosaic.fake_quant(normal((2, 1, 1, 64)), 3)
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [gpu])
    with pytest.raises(NotImplementedError, match=r"8\.0, allowed are 9\.0"):
        mosaic.fake_quant(normal((2, 8, 8, 64)), 3)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with pytest.raises(NotImplementedError, match=r"JAX .*, allowed are 0\.12 and later"):
        mosaic.fake_quant(normal((2, 8, 8, 64)), 3, interpret=True)
