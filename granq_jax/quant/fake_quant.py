"""``fake_quant``: quantize and dequantize in one vectorized pass, with a straight-through gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from granq_jax.kernels import sample_channel
from granq_jax.quant.affine import (
    affine_codes,
    affine_values,
    check_float,
    compute_dtype,
    over_groups,
    scale_and_zero_point,
)
from granq_jax.quant.spec import IMPLEMENTATIONS, check_bits, check_choice, kept_axes

_KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
      impl: ``"xla"``; ``"pallas"``, the GPU kernel; ``"pallas_interpret"``, the same kernel run by
        Pallas' interpreter on any platform; or ``"auto"``, the kernel where the program is lowered
        for a GPU and XLA elsewhere. The kernel covers ``"sample_channel"`` of (N, H, W, C) in
        float32, bfloat16 and float16; XLA computes the rest whatever ``impl`` says.
      axis_name: mapped axis (of ``pmap`` or ``shard_map``) that splits the batch. Ranges that
        several samples share are then taken over all devices, as one device would.

    Returns:
      An array of the shape and dtype of ``x``. Float64 is computed in float64, all else in float32.

    Raises:
      TypeError: if ``x`` is not floating point or ``bits`` not an integer.
      ValueError: for any other value that is not allowed, naming it.

    Example:
      >>> import jax.numpy as jnp
      >>> fake_quant(jnp.array([[0.0, 0.9, 2.2, 3.0]]), bits=2).tolist()
      [[0.0, 1.0, 2.0, 3.0]]
    """
    x = check_float(x)
    check_bits("bits", bits)
    check_choice("impl", impl, IMPLEMENTATIONS)
    batch_is_shared = 0 not in kept_axes(granularity, x.ndim)
    return _fake_quant(x, bits, granularity, impl, axis_name if batch_is_shared else None)


def _xla(x, bits, granularity, axis_name):
    def one_group(x):
        scale, zero_point = scale_and_zero_point(x, bits, axis_name)
        return affine_values(affine_codes(x, scale, zero_point, bits), scale, zero_point)

    return over_groups(one_group, granularity, x.ndim)(x.astype(compute_dtype(x.dtype))).astype(x.dtype)


def _forward(x, bits, granularity, impl, axis_name):
    by_xla = partial(_xla, bits=bits, granularity=granularity, axis_name=axis_name)
    by_kernel = partial(sample_channel.fake_quant, bits=bits)
    covered = granularity == "sample_channel" and x.ndim == 4 and x.size > 0 and x.dtype in _KERNEL_DTYPES
    if impl == "xla" or not covered:
        return by_xla(x)
    if impl == "pallas_interpret":
        return by_kernel(x, interpret=True)
    if impl == "pallas":
        return by_kernel(x)
    return jax.lax.platform_dependent(x, cuda=by_kernel, rocm=by_kernel, default=by_xla)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _straight_through(x, bits, granularity, impl, axis_name):
    return _forward(x, bits, granularity, impl, axis_name)


def _straight_through_forward(x, bits, granularity, impl, axis_name):
    return _forward(x, bits, granularity, impl, axis_name), None


def _straight_through_backward(bits, granularity, impl, axis_name, residuals, cotangent):
    return (cotangent,)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)
_fake_quant = jax.jit(_straight_through, static_argnums=(1, 2, 3, 4))
