"""Fake quantization of weights with a range for each output channel.

A weight (..., I, O) is an activation of one sample, a pixel for every row of O numbers, so this is the kernel
of :mod:`granq_jax.kernels.sample_channel` under a name of its own.
"""

from __future__ import annotations

import jax
from granq_jax.kernels import sample_channel

NAME = "fake_quant_out_channel"


def reference(w: jax.Array, bits: int) -> jax.Array:
    """What :func:`fake_quant` computes, in plain ``jax.numpy``."""
    return sample_channel.reference(w[None], bits)[0]


def fake_quant(w: jax.Array, bits: int, *, interpret: bool = False) -> jax.Array:
    """Fake quantization of ``w``, a kernel (H, W, I, O) or dense weight (I, O), of its dtype.

    Args:
      w: two or more dimensions, output channels last; float32, bfloat16 or float16.
      bits: 2 to 8.
      interpret: as in :func:`granq_jax.kernels.sample_channel.fake_quant`.
    """
    return sample_channel.fake_quant(w[None], bits, interpret=interpret, name=NAME)[0]
