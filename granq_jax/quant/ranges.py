"""Activation ranges that are kept: a moving average of those measured, frozen before it is used.

With the range (l, h) of each batch and decay d = 0.9: ``low = d low + (1 - d) l``, ``high = d high + (1 - d) h``,
which is how the quantizers of GDFQ (Xu et al., ECCV 2020), AdaDFQ and their kin find the range of an
activation. (Their code also divides by 1 - d^t at each step, which for an average that starts at 0 would undo
its bias once; by the end of the warm-up, when they freeze it, nothing of that is left. Here it starts at the
first range that is measured.)

Ranges lie in a collection of the student's variables, :data:`RANGES`, at the path of the module whose
activation they are of. ``apply`` uses those that are there as they are, measures those that are not on
the batch at hand, and moves them all where the collection is mutable. Each is one array (2, ...): the
least and the greatest value of each group, of the rank of the activation, with size 1 along shared axes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from granq_jax.quant.affine import QuantizedArray, affine_codes, affine_values, affine_within, compute_dtype
from granq_jax.quant.spec import kept_axes

RANGES = "granq_ranges"  # by a name that no model has for a collection of its own
DECAY = 0.9
_SHARES = tuple(n / 16 for n in range(16, 5, -1))  # of a weight's range


def measured(x: jax.Array, granularity: str, axis_name: str | None = None) -> jax.Array:
    """The ranges of an activation; those that samples share are taken over all devices.

    Examples:
      >>> measured(jnp.array([[1.0, 2.0], [3.0, 0.0]]), "channel").tolist()
      [[[1.0, 0.0]], [[3.0, 2.0]]]
    """
    x = jax.lax.stop_gradient(x).astype(compute_dtype(x.dtype))
    kept = kept_axes(granularity, x.ndim)
    shared = tuple(axis for axis in range(x.ndim) if axis not in kept)
    low, high = jnp.min(x, shared, keepdims=True), jnp.max(x, shared, keepdims=True)
    if axis_name is not None and 0 in shared:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    return jnp.stack([low, high])


@partial(jax.jit, static_argnums=(1, 2))
def of_least_error(x: jax.Array, granularity: str, bits: int) -> jax.Array:
    """The ranges of a weight that quantize it with the least squared error, of those in question.

    Those are (s min, s max) for s = 1, 15/16, ... 6/16: what a few outliers lose by the clip all others
    gain by a finer step (Banner et al., NeurIPS 2019, have the analysis). Of equals, the widest.

    Args:
      x: (..., O).
      granularity: which elements share a range.
      bits: 2 to 8.

    Returns:
      (2, ...), see :mod:`granq_jax.quant.ranges`. A group with NaN or infinity keeps its own range.

    Examples:
      >>> x = jnp.array([[-1.0], [-0.9], [0.9], [1.0], [4.0], [-4.0]] + 50 * [[0.8], [-0.8]])
      >>> float(of_least_error(x, "out_channel", 2)[1].item()) < 4
      True
    """
    whole = measured(x, granularity)
    shared = tuple(axis for axis in range(x.ndim) if axis not in kept_axes(granularity, x.ndim))

    def error(share):
        return jnp.sum(jnp.square(fake_quant_within(x, share * whole, bits) - x), shared, keepdims=True)

    shares = jnp.asarray(_SHARES, whole.dtype)
    return shares[jnp.argmin(jax.lax.map(error, shares), axis=0)][None] * whole


def moved(average: jax.Array, batch: jax.Array) -> jax.Array:
    """The moving average after one more batch.

    Examples:
      >>> moved(jnp.array([[0.0], [10.0]]), jnp.array([[-10.0], [0.0]])).round(6).tolist()
      [[-1.0], [9.0]]
    """
    return DECAY * average + (1 - DECAY) * batch


def codes_within(x: jax.Array, within: jax.Array, bits: int) -> QuantizedArray:
    """The codes of ``x`` where the range is given; what lies outside takes the nearest code."""
    codes, group = _codes(x, within, bits)
    return QuantizedArray(codes.astype(jnp.int8), group.scale, group.step, group.zero_point, bits)


def _codes(x, within, bits):
    group = affine_within(within[0], within[1], bits)
    return affine_codes(x.astype(group.step.dtype), group.scale, group.zero_point, bits), group


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def fake_quant_within(x: jax.Array, within: jax.Array, bits: int) -> jax.Array:
    """:func:`granq_jax.fake_quant` where the range is given.

    What lies outside becomes the nearest level. The gradient is the identity in ``x``, outside the range
    too, as in the code of GDFQ.

    Examples:
      >>> x = jnp.array([[-1.0, 0.9, 2.2, 9.0]])
      >>> fake_quant_within(x, jnp.array([[[0.0]], [[3.0]]]), 2).tolist()
      [[0.0, 1.0, 2.0, 3.0]]
    """
    codes, group = _codes(x, within, bits)
    return affine_values(codes, group.step, group.zero_point).astype(x.dtype)


def _forward(x, within, bits):
    return fake_quant_within(x, within, bits), None


def _backward(bits, _, cotangent):
    return cotangent, None


fake_quant_within.defvjp(_forward, _backward)
