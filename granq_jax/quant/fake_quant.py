"""``fake_quant``: quantize and dequantize in one vectorized pass, with a straight-through gradient.

``norm_act_fake_quant`` is the same with what a network computes right before it, for one kernel to do it all.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from granq_jax.errors import check_choice
from granq_jax.models.layers import ACTIVATIONS, frozen_norm
from granq_jax.quant.affine import (
    affine,
    affine_codes,
    affine_values,
    check_float,
    compute_dtype,
    over_groups,
)
from granq_jax.quant.dispatch import IMPLEMENTATIONS, dispatch, has_kernel, on_mosaic
from granq_jax.quant.spec import check_bits, granularity_of, kept_axes


class FrozenNorm(NamedTuple):
    """A batch norm that is not training, as ``(x - mean) * factor + bias``; (C,) each."""

    mean: jax.Array
    factor: jax.Array
    bias: jax.Array


class _How(NamedTuple):
    bits: int
    granularity: str
    impl: str
    axis_name: str | None = None
    activation: str | None = None


def fake_quant(
    x: jax.Array,
    *,
    bits: int,
    granularity: str = "sample_channel",
    impl: str = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Quantizes ``x`` and returns the values that its codes stand for.

    All ranges, scales and zero points are computed in one vectorized pass and applied in another;
    for the formula see :mod:`granq_jax.quant.affine`. The gradient is the identity in ``x``
    (straight-through estimator, Bengio et al., arXiv:1308.3432) and does not reach the ranges.

    A group that holds a NaN becomes NaN as a whole, and so does one of infinite range; neither
    touches another group.

    Args:
      x: float array, activations (N, ..., C) or kernels (..., I, O), of two or more dimensions.
      bits: 2 to 8.
      granularity: which elements share a range: ``"sample_channel"``, ``"channel"``, ``"sample"``,
        ``"tensor"`` of activations, ``"out_channel"``, ``"kernel"``, ``"tensor"`` of weights; see
        :func:`granq_jax.quant.spec.kept_axes`.
      impl: see :func:`granq_jax.quant.dispatch.dispatch`. The kernels cover ``"sample_channel"`` of
        (N, ..., C) and ``"out_channel"`` in float32, bfloat16 and float16; XLA computes the rest.
      axis_name: mapped axis (of ``pmap`` or ``shard_map``) that splits the batch. Ranges that
        several samples share are then taken over all devices, as one device would.

    Returns:
      An array of the shape and dtype of ``x``. Float64 is computed in float64, all else in float32.

    Raises:
      InputTypeError: if ``x`` is not floating point or ``bits`` not an integer.
      InputError: for any other value that is not allowed, naming it.

    Examples:
      >>> import jax.numpy as jnp
      >>> fake_quant(jnp.array([[0.0, 0.9, 2.2, 3.0]]), bits=2).tolist()
      [[0.0, 1.0, 2.0, 3.0]]
    """
    x = check_float(x)
    check_bits("bits", bits)
    check_choice("impl", impl, IMPLEMENTATIONS)
    batch_is_shared = 0 not in kept_axes(granularity, x.ndim)
    granularity = granularity_of(granularity, x.shape)
    return _straight_through(_How(bits, granularity, impl, axis_name if batch_is_shared else None), x, None, None)


def norm_act_fake_quant(
    x: jax.Array,
    *,
    bits: int,
    norm: FrozenNorm | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> jax.Array:
    """``fake_quant(activation(norm(x) + residual))`` with ``"sample_channel"`` ranges; each part may be missing.

    On a GPU that is one launch: a read of ``x`` and ``residual``, and a write. The gradient is that of the
    float function before the quantizer, computed anew from ``x`` and ``residual``: the output does not tell
    which elements an activation let through, for a small positive one may have been rounded to 0.

    Args:
      x: (N, ..., C) of one of :data:`granq_jax.quant.dispatch.KERNEL_DTYPES`.
      bits: 2 to 8.
      norm: of the dtype of ``x``, or float32.
      residual: of the shape and dtype of ``x``.
      activation: a key of :data:`granq_jax.models.layers.ACTIVATIONS`.
      impl: see :func:`fake_quant`.
    """
    granularity = granularity_of("sample_channel", x.shape)
    return _straight_through(_How(bits, granularity, impl, activation=activation), x, norm, residual)


def _before(x, norm, residual, activation):
    """What comes before the quantizer, in the arithmetic of the layers that it stands for."""
    dtype = x.dtype
    if norm is not None:
        x = frozen_norm(x, *norm).astype(dtype)
    if residual is not None:
        x = x + residual
    return x if activation is None else ACTIVATIONS[activation](x)


def _by_xla(x, norm, residual, *, how):
    def one_group(x):
        scale, step, zero_point = affine(x, how.bits, how.axis_name)
        return affine_values(affine_codes(x, scale, zero_point, how.bits), step, zero_point)

    x = _before(x, norm, residual, how.activation)
    return over_groups(one_group, how.granularity, x.ndim)(x.astype(compute_dtype(x.dtype))).astype(x.dtype)


def _by_kernel(x, norm, residual, *, how, interpret):
    # Imported here: see granq_jax.quant.dispatch.
    nothing_before = norm is None and residual is None and how.activation is None
    if on_mosaic() and nothing_before and how.granularity == "sample_channel":
        from granq_jax.kernels import mosaic

        if mosaic.covers(x):
            return mosaic.fake_quant(x, how.bits, interpret=interpret)
    from granq_jax.kernels import out_channel, sample_channel

    if how.granularity == "out_channel":
        return out_channel.fake_quant(x, how.bits, interpret=interpret)
    if norm is not None:
        norm = jnp.stack([norm.factor, norm.bias - norm.mean * norm.factor]).astype(jnp.float32)
    return sample_channel.fake_quant(
        x, how.bits, norm=norm, residual=residual, activation=how.activation, interpret=interpret
    )


# Both are jitted within, not around, what is differentiated, so that a network's arrays of one shape are traced once.
@partial(jax.jit, static_argnums=0)
def _fake_quant(how, x, norm, residual):
    # A kernel sees the samples of one device.
    impl = how.impl if how.axis_name is None and has_kernel(x, how.granularity) else "xla"
    return dispatch(impl, partial(_by_xla, how=how), partial(_by_kernel, how=how), x, norm, residual)


@partial(jax.jit, static_argnums=0)
def _to_operands(activation, operands, cotangent):
    return jax.vjp(partial(_before, activation=activation), *operands)[1](cotangent)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(how, x, norm, residual):
    return _fake_quant(how, x, norm, residual)


def _straight_through_forward(how, x, norm, residual):
    nothing_before = norm is None and residual is None and how.activation is None
    return _fake_quant(how, x, norm, residual), None if nothing_before else (x, norm, residual)


def _straight_through_backward(how, saved, cotangent):
    return (cotangent, None, None) if saved is None else _to_operands(how.activation, saved, cotangent)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)
