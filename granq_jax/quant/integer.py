"""Convolutions and matrix products on integer codes, accumulated in int32.

With x = s_x (q_x + z_x) and w = s_w (q_w + z_w), where steps s and zero points z do not depend on what is summed
over, a sum over the taps that lie within the image is::

    sum x w = s_x s_w (A + z_x C + z_w (B + z_x D))
    A = sum q_x q_w,  B = sum q_x,  C = sum q_w,  D = the number of taps

(Jacob et al., CVPR 2018, section 2.3.) Padding adds zeros to an image, not to its codes: it is no tap, and
near a border B, C and D are sums over fewer. A, B, C and D are int32 and exact; only what puts them together
is floating point. That a range does not depend on what is summed over holds for activations with a range for a
sample (``"sample"``) or for all (``"tensor"``) and weights with one for an output channel or for all. It does not
for ``"sample_channel"``, whose steps lie along the input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.errors import InputTypeError
from granq_jax.quant.affine import QuantizedArray

ACT_GRANULARITIES = ("sample", "tensor")
WEIGHT_GRANULARITIES = ("out_channel", "tensor")
_LARGEST = 2**31 - 1


class Sums(NamedTuple):
    """The four sums, int32, each of a shape that broadcasts to the output's."""

    products: jax.Array
    inputs: jax.Array
    weights: jax.Array
    taps: jax.Array


def convolution_sums(
    x: jax.Array,
    w: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    kernel_dilation: Sequence[int],
    groups: int = 1,
) -> Sums:
    """The sums of a convolution of codes.

    Args:
      x: codes (N, ..., C), int8.
      w: codes (..., C / groups, O), int8.
      strides: of each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or a pair for each spatial axis.
      kernel_dilation: of each spatial axis.
      groups: of channels; C for a depthwise convolution.
    """
    spatial = tuple(range(1, x.ndim - 1))
    image = (0, x.ndim - 1, *spatial)
    numbers = jax.lax.ConvDimensionNumbers(image, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), image)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            tuple(strides),
            padding if isinstance(padding, str) else tuple(padding),
            rhs_dilation=tuple(kernel_dilation),
            dimension_numbers=numbers,
            feature_group_count=groups,
            preferred_element_type=jnp.int32,
        )

    def for_every_output(sums):  # one of each group so far
        return jnp.repeat(sums, w.shape[-1] // groups, axis=-1)

    one_image, one_output = jnp.ones((1, *x.shape[1:]), x.dtype), jnp.ones((*w.shape[:-1], groups), w.dtype)
    return Sums(
        convolve(x, w),
        for_every_output(convolve(x, one_output)),
        convolve(one_image, w),
        for_every_output(convolve(one_image, one_output)),
    )


def product_sums(x: jax.Array, w: jax.Array) -> Sums:
    """The sums of a matrix product of codes, (..., I) and (I, O), int8."""
    products = jnp.tensordot(x, w, axes=1, preferred_element_type=jnp.int32)
    inputs = jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.int32)
    weights = jnp.sum(w, axis=0, dtype=jnp.int32)
    lead = (1,) * (x.ndim - 1)
    return Sums(products, inputs, weights.reshape(*lead, -1), jnp.full((*lead, 1), w.shape[0], jnp.int32))


def put_together(sums: Sums, x: QuantizedArray, w: QuantizedArray) -> jax.Array:
    """The values that the sums of codes stand for."""
    products, inputs, weights, taps = (jnp.asarray(part, x.step.dtype) for part in sums)
    # Of a weight (..., I, O), ranges lie along O alone: they broadcast as (1, ..., O).
    w_step, w_zero = (part.reshape((1,) * (products.ndim - 1) + (-1,)) for part in (w.step, w.zero_point))
    whole = products + x.zero_point * weights + w_zero * (inputs + x.zero_point * taps)
    return x.step * w_step * whole


def can_be_summed(module: nn.Module, w: QuantizedArray, x: QuantizedArray) -> bool:
    """Whether a layer is a convolution or product that this computes, with sums that fit in int32.

    A class derived from these may compute something else, and a convolution takes batches of any rank.
    """
    taps = int(np.prod(w.codes.shape[:-1]))
    if taps * 2 ** (x.bits - 1) * 2 ** (w.bits - 1) > _LARGEST:
        return False
    if type(module) is nn.Conv:
        if x.codes.ndim != w.codes.ndim:
            return False
        dilated = module.input_dilation not in (1, None) and set(np.ravel(module.input_dilation)) != {1}
        named = isinstance(module.padding, str) and module.padding not in ("SAME", "VALID")
        return not dilated and not named and module.mask is None
    return type(module) is nn.Dense


def integer_layer(module: Any, x: QuantizedArray, w: QuantizedArray) -> jax.Array:
    """The output of an ``nn.Conv`` or ``nn.Dense`` on codes of its input and its kernel.

    Args:
      module: bound, for its bias and how it convolves.
      x: codes of its input, (N, ..., C).
      w: codes of its kernel.
    """
    if isinstance(module, nn.Conv):
        axes = x.codes.ndim - 2
        sums = convolution_sums(
            x.codes,
            w.codes,
            _for_each(module.strides, axes),
            _padding(module.padding, axes),
            _for_each(module.kernel_dilation, axes),
            module.feature_group_count,
        )
    else:
        sums = product_sums(x.codes, w.codes)
    y = put_together(sums, x, w)
    if module.use_bias:
        y = y + module.get_variable("params", "bias").reshape((1,) * (y.ndim - 1) + (-1,))
    return y


@jax.custom_vjp
def without_gradient(y: jax.Array, *inputs: jax.Array) -> jax.Array:
    """``y``; to ask for its gradient, or that of the ``inputs`` it was made of, is an error."""
    return y


def _no_gradient(*_: Any) -> Any:
    raise InputTypeError("arithmetic='integer' is for inference and has no gradient; quantize with arithmetic='float'")


without_gradient.defvjp(_no_gradient, _no_gradient)


def _padding(padding: Any, axes: int) -> str | list[tuple[int, int]]:
    if isinstance(padding, str):
        return padding
    pairs = [padding] * axes if isinstance(padding, int) else padding
    return [(pair, pair) if isinstance(pair, int) else (pair[0], pair[1]) for pair in pairs]


def _for_each(number: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    return (number or 1,) * axes if number is None or isinstance(number, int) else tuple(number)
