"""Compares quantized values: equal to rounding, but for a neighbouring level right beside a tie."""

import jax.numpy as jnp
import numpy as np

NEAR_A_TIE = 1e-4
DTYPES = ["float32", "bfloat16", "float16"]


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same_levels(y, expected, v, bits):
    """``y`` is ``expected``, the quantized values of ``v`` (N, ..., C): to 2 ulp in float32, to one level else.

    In float32 a value within 1e-4 of a tie may have the neighbouring level. Returns how many have.
    """
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    v, axes = np.asarray(v, np.float32), tuple(range(1, v.ndim - 1))
    low, high = v.min(axes, keepdims=True), v.max(axes, keepdims=True)
    scale = np.float32(2**bits - 1) / np.maximum(high - low, np.float32(1e-8))
    zero = np.round(scale * low) + 2 ** (bits - 1)
    float32 = y.dtype == jnp.float32
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    difference = np.abs(y - expected)
    if not float32:
        assert (difference <= 1.01 / scale + 2**-7 * np.abs(expected)).all()
        return 0
    ulp = np.spacing(np.maximum(np.abs(y), np.abs(expected)).astype(np.float32))
    other = difference > 2 * ulp
    position = scale * v.astype(np.float64) - zero
    beside = np.abs(position - np.floor(position) - 0.5) < NEAR_A_TIE
    assert not (other & ~beside).any(), (difference / ulp)[other & ~beside].max()
    assert not (other & (difference > 1.01 / scale + 2 * ulp)).any()
    return int(other.sum())
