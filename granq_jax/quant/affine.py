"""The affine arithmetic: ranges to scales and zero points, values to codes and back.

For the elements that share a range, with n = 2^bits - 1 and h = 2^(bits - 1)::

    scale = n / max(max(x) - min(x), 1e-8)
    zero  = round(scale * min(x)) + h
    code  = clip(round(scale * x - zero), -h, h - 1)
    y     = (code + zero) / scale       (computed with max(max(x) - min(x), 1e-8) / n for 1 / scale)

Rounding is half to even. The order of operations is that of the ZeroQ lineage of quantizers
(Cai et al., CVPR 2020), which GranQ builds on; the clip, which that code lacks, keeps ties at the
upper end of the range from needing a level that ``bits`` bits cannot hold.

The formula is written once, for one group of elements that share a range (of an activation: the
channel map of one sample), and vectorized over groups by ``jax.vmap``; XLA compiles that to the
same fused reductions and element-wise pass as code written out with ``keepdims``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from granq_jax.errors import InputTypeError, check_choice
from granq_jax.kernels import MIN_RANGE
from granq_jax.quant.dispatch import IMPLEMENTATIONS, dispatch, has_kernel
from granq_jax.quant.spec import check_bits, granularity_of, kept_axes


class QuantizedArray(flax.struct.PyTreeNode):
    """Integer codes with the scale and zero point to read them: a pytree.

    Attributes:
      codes: int8, the shape of the array that was quantized.
      scale: float, of the same rank with size 1 along every shared axis, so that it broadcasts.
      step: float like ``scale``, 1 / scale.
      zero_point: float like ``scale`` (a constant channel's does not fit an integer).
      bits: the bit width, static.
    """

    codes: jax.Array
    scale: jax.Array
    step: jax.Array
    zero_point: jax.Array
    bits: int = flax.struct.field(pytree_node=False)


class Affine(NamedTuple):
    """How one group is quantized: three scalars.

    Attributes:
      scale: codes per unit.
      step: units per code, 1 / scale, from the range itself: XLA rounds a division by a scale in
        ways that depend on what is around it, a product only in one.
      zero_point: what a code of 0 stands for, in codes.
    """

    scale: jax.Array
    step: jax.Array
    zero_point: jax.Array


def affine(x: jax.Array, bits: int, axis_name: str | None = None) -> Affine:
    """Scale, step and zero point of one group: all elements of ``x`` share a range.

    Args:
      x: float array of any shape.
      bits: 2 to 8.
      axis_name: mapped axis (of ``pmap`` or ``shard_map``) over which the range is taken as well.
    """
    low, high = jnp.min(x), jnp.max(x)
    if axis_name is not None:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    return affine_within(low, high, bits)


def affine_within(low: jax.Array, high: jax.Array, bits: int) -> Affine:
    """Scale, step and zero point of the range from ``low`` to ``high``, arrays that broadcast."""
    width = jnp.maximum(high - low, MIN_RANGE)
    levels = 2**bits - 1
    scale = levels / width
    return Affine(scale, width * (1 / levels), jnp.round(scale * low) + 2 ** (bits - 1))


def affine_codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """The codes of ``x``, still in floating point: ``clip(round(scale * x - zero), -h, h - 1)``."""
    half = 2 ** (bits - 1)
    return jnp.clip(jnp.round(scale * x - zero_point), -half, half - 1)


def affine_values(codes: jax.Array, step: jax.Array, zero_point: jax.Array) -> jax.Array:
    """The values that codes stand for: ``(code + zero) * step``."""
    return (codes + zero_point) * step


def over_groups(function: Callable, granularity: str, ndim: int) -> Callable:
    """Vectorizes ``function`` of one group over all groups that ``granularity`` makes of an array.

    ``function`` maps an array to arrays of the same rank; so does the result, for ``ndim`` axes.
    """
    # Channels inside, samples outside: in this order XLA needs no transposes to fuse the result.
    # Axes count from the end, where an outer vmap's taking an axis away does not move them.
    for axis in reversed(kept_axes(granularity, ndim)):
        function = jax.vmap(function, in_axes=axis - ndim, out_axes=axis - ndim)
    return function


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype the arithmetic is done in: float64 stays, anything narrower becomes float32."""
    return jnp.promote_types(dtype, jnp.float32)


def check_float(x: jax.Array) -> jax.Array:
    """Returns ``x`` as an array; raises a ``TypeError`` if it does not hold floating-point numbers.

    Several arrays are not one: a tuple of them, as a module may return it, is refused.
    """
    if isinstance(x, tuple | list | dict) and any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x)):
        raise InputTypeError(f"x: got a {type(x).__name__} of arrays, allowed is one floating-point array")
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"x: got {type(x).__name__}, allowed are floating-point arrays: {error}") from None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputTypeError(f"x: got dtype {x.dtype}, allowed are floating-point dtypes")
    return x


def quantize_codes(
    x: jax.Array, *, bits: int, granularity: str = "sample_channel", impl: str = "auto"
) -> QuantizedArray:
    """Quantizes ``x`` to integer codes.

    Args:
      x: float array of two or more dimensions: activations (N, ..., C) or kernels (..., I, O).
      bits: 2 to 8.
      granularity: which elements share a range, see :func:`granq_jax.quant.spec.kept_axes`.
      impl: see :func:`granq_jax.quant.dispatch.dispatch`.

    Returns:
      The codes, scales, steps and zero points. ``dequantize`` of it is ``fake_quant(x, ...)`` to rounding,
      in the dtype of the arithmetic (float32, or float64 for float64 ``x``). Codes of NaN are
      arbitrary.

    Raises:
      TypeError, ValueError: for a dtype, bit width or granularity that is not allowed.

    Examples:
      >>> import jax.numpy as jnp
      >>> q = quantize_codes(jnp.array([[0.0, 1.0, 2.0, 3.0]]), bits=2)
      >>> q.codes.tolist(), q.scale.shape, dequantize(q).tolist()
      ([[-2, -1, 0, 1]], (1, 1), [[0.0, 1.0, 2.0, 3.0]])
    """
    x = check_float(x)
    check_bits("bits", bits)
    check_choice("impl", impl, IMPLEMENTATIONS)
    granularity = granularity_of(granularity, x.shape)
    return _quantize_codes(x, bits, granularity, impl if has_kernel(x, granularity) else "xla")


@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_codes(x, bits, granularity, impl):
    def by_kernel(x, *, interpret):
        from granq_jax.kernels import codes as codes_kernel  # here: see granq_jax.quant.dispatch

        if granularity == "out_channel":  # a weight is an activation of one sample
            arrays = (array[0] for array in codes_kernel.quantize(x[None], bits, interpret=interpret))
        else:
            arrays = codes_kernel.quantize(x, bits, interpret=interpret)
        codes, scale, zero_point = arrays
        return codes, scale, 1 / scale, zero_point

    def by_xla(x):
        return over_groups(one_group, granularity, x.ndim)(x.astype(compute_dtype(x.dtype)))

    def one_group(x):
        group = affine(x, bits)
        codes = affine_codes(x, group.scale, group.zero_point, bits).astype(jnp.int8)
        return codes, *(number.reshape((1,) * x.ndim) for number in group)

    codes, scale, step, zero_point = dispatch(impl, by_xla, by_kernel, x)
    return QuantizedArray(codes, scale, step, zero_point, bits)


def dequantize(q: QuantizedArray) -> jax.Array:
    """The values that the codes of ``q`` stand for, in the dtype of its scale.

    Raises:
      InputTypeError: if ``q`` is not a ``QuantizedArray``.
    """
    if not isinstance(q, QuantizedArray):
        raise InputTypeError(f"q: got {type(q).__name__}, allowed is a QuantizedArray")
    return _dequantize(q)


@jax.jit
def _dequantize(q):
    return affine_values(q.codes.astype(q.step.dtype), q.step, q.zero_point)
