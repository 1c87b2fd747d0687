"""``convolve``: ``lax.conv_general_dilated`` with forms and gradients that are fast on CPUs too.

XLA for CPUs computes a convolution well where its operands fit in the cache and it has many output
channels, and several times more slowly where not, most of all the gradient to the kernel. Each form
here is the same sum in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from granq_jax.runtime.platforms import by_platform

_NHWC = ("NHWC", "HWIO", "NHWC")
# What a part of the batch may take so that it stays in the cache while its share of the kernel's
# gradient is computed.
_PART_BYTES = 2**19
# Each part is compiled on its own.
_MAX_PARTS = 32
# As many float32 as the widest registers of a CPU hold: with no more output channels they are not kept busy.
_FEW_CHANNELS = 16


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Convolves ``x`` (N, H, W, C) with ``kernel`` (height, width, C / groups, features).

    Takes and returns what :func:`jax.lax.conv_general_dilated` does, but is channels last unless told
    otherwise, so that it can be the ``conv_general_dilated`` of a ``flax.linen.Conv``. It has gradients
    in reverse mode only. The forms are for float32 and float64:

    - On CPUs, a convolution with a 1x1 kernel is a matrix product. (On GPUs not: XLA's own fusions of
      one with the strides around it can fail to compile there.)
    - On CPUs, a convolution between few channels computes several neighbouring columns at once, as
      the channels of one: more multiplications, at a better rate.
    - On CPUs, a convolution from many channels to few is a matrix product with all taps of the kernel
      side by side, and a sum of its parts, each shifted.
    - On CPUs, the gradient to the kernel is the sum of those of small parts of the batch, two columns at once where
      channels are few.
    - On CPUs, a depthwise convolution (every channel by itself) is a sum of shifted images, each times its tap, and
      the gradient to the kernel is gathered row by row.

    Examples:
      >>> import jax.numpy as jnp
      >>> convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), "VALID")[0, :, :, 0].tolist()
      [[18.0, 18.0], [18.0, 18.0]]
    """
    plain = partial(
        lax.conv_general_dilated,
        x,
        kernel,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=_NHWC if dimension_numbers is None else dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if x.ndim != 4 or x.dtype.itemsize < 4 or dilated or precision is not None:
        return plain()
    if dimension_numbers is not None:
        numbers = [lax.conv_dimension_numbers(x.shape, kernel.shape, d) for d in (dimension_numbers, _NHWC)]
        if numbers[0] != numbers[1]:
            return plain()
    depthwise = feature_group_count > 1
    if depthwise and not feature_group_count == x.shape[3] == kernel.shape[3]:
        return plain()
    strides, window = tuple(window_strides), kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    padded = [size + low + high for size, (low, high) in zip(x.shape[1:3], padding, strict=True)]
    if 0 in (*x.shape, *kernel.shape) or min(itertools.chain(*padding)) < 0 or any(map(int.__lt__, padded, window)):
        return plain()
    return (_depthwise if depthwise else _convolve)(x, kernel, strides, padding)


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


def _to_kernel(x, kernel, cotangent, strides, padding, columns=1):
    def convolution(kernel):
        return _plain(x, kernel, strides, padding) if columns == 1 else _in_columns(x, kernel, padding, columns)

    return jax.linear_transpose(convolution, kernel)(cotangent)[0]


def _is_pointwise(kernel_shape, padding):
    return kernel_shape[:2] == (1, 1) and not any(itertools.chain(*padding))


def _pointwise(x, kernel, strides):
    return jnp.einsum("nhwc,cf->nhwf", x[:, :: strides[0], :: strides[1]], kernel[0, 0])


def _is_narrow(kernel_shape, strides):
    """Whether a matrix product with all taps, none of them skipped, widens no pixel."""
    height, width, channels, features = kernel_shape
    return strides == (1, 1) and height * width * features <= channels


def _columns_at_once(width, kernel_shape, strides, padding):
    """How many neighbouring output columns are worth computing as channels of one."""
    _, taps, channels, features = kernel_shape
    if strides != (1, 1) or taps == 1 or max(channels, features) > _FEW_CHANNELS:
        return 1
    columns = 4 if min(channels, features) < _FEW_CHANNELS // 2 else 2
    return 1 if (width + sum(padding) - taps + 1) % columns else columns


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides, padding):
    return _convolution(x, kernel, strides, padding)


def _forward(x, kernel, strides, padding):
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, cotangent):
    return _convolution_gradients(*residuals, cotangent, strides, padding)


_convolve.defvjp(_forward, _backward)


# Both are jitted within, not around, what is differentiated, so that a network's convolutions of one shape are
# traced once.
@partial(jax.jit, static_argnums=(2, 3))
def _convolution(x, kernel, strides, padding):
    plain = partial(_plain, strides=strides, padding=padding)
    columns = _columns_at_once(x.shape[2], kernel.shape, strides, padding[1])
    if _is_pointwise(kernel.shape, padding):
        for_cpu = partial(_pointwise, strides=strides)
    elif _is_narrow(kernel.shape, strides):
        for_cpu = partial(_sum_of_shifted, padding=padding)
    elif columns > 1:
        for_cpu = partial(_in_columns, columns=columns, padding=padding)
    else:
        return plain(x, kernel)
    return by_platform(x, kernel, cpu=for_cpu, default=plain)


@partial(jax.jit, static_argnums=(3, 4))
def _convolution_gradients(x, kernel, cotangent, strides, padding):
    window = kernel.shape[:2]

    def plain_to_x(kernel, cotangent):
        return jax.linear_transpose(lambda x: _plain(x, kernel, strides, padding), x)(cotangent)[0]

    def plain(x, kernel, cotangent):
        return plain_to_x(kernel, cotangent), _to_kernel(x, kernel, cotangent, strides, padding)

    def pointwise(x, kernel, cotangent):
        return jax.vjp(partial(_pointwise, strides=strides), x, kernel)[1](cotangent)

    def narrow(x, kernel, cotangent):
        return _narrow_gradients(x, kernel, cotangent, padding)

    def in_parts(x, kernel, cotangent):
        turned, around = kernel[::-1, ::-1].swapaxes(2, 3), _around(window, padding)
        columns = _columns_at_once(cotangent.shape[2], turned.shape, strides, around[1])
        to_x = _in_columns(cotangent, turned, around, columns) if columns > 1 else plain_to_x(kernel, cotangent)
        # The gradient to the kernel is at its fastest with two columns, even where four are best else.
        columns = min(2, _columns_at_once(x.shape[2], kernel.shape, strides, padding[1]))
        size = _part_size(x, kernel, cotangent)
        parts = [slice(start, start + size) for start in range(0, len(x), size)]
        return to_x, sum(_to_kernel(x[part], kernel, cotangent[part], strides, padding, columns) for part in parts)

    if _is_pointwise(kernel.shape, padding):
        for_cpu = pointwise
    else:
        for_cpu = narrow if _is_narrow(kernel.shape, strides) else in_parts
    return by_platform(x, kernel, cotangent, cpu=for_cpu, default=plain)


def _around(window, padding):
    """The padding of a cotangent with which its convolution with the turned kernel is the gradient to ``x``."""
    # Tap i met the pixel a of x for the output pixel a + low - i.
    return [(taps - 1 - low, taps - 1 - high) for taps, (low, high) in zip(window, padding, strict=True)]


def _in_columns(x, kernel, padding, columns):
    """The convolution with ``columns`` columns at a time, each a shifted copy of ``kernel``'s features."""
    shifts = [((0, 0), (shift, columns - 1 - shift), (0, 0), (0, 0)) for shift in range(columns)]
    wide = jnp.concatenate([jnp.pad(kernel, shift) for shift in shifts], axis=-1)
    y = _plain(x, wide, (1, columns), padding)
    return y.reshape(*y.shape[:2], -1, kernel.shape[-1])


def _part_size(x, kernel, cotangent):
    """Samples in a part: no fewer than pay for adding up another gradient of the kernel's size."""
    sample = max(x.nbytes, cotangent.nbytes) // len(x)
    size = max(-(-max(_PART_BYTES, kernel.nbytes) // sample), -(-len(x) // _MAX_PARTS))
    return len(x) if len(x) <= 2 * size else size


def _sum_of_shifted(x, kernel, padding):
    """The convolution as ``x`` times all taps, added up where they belong."""
    n, height, width, channels = x.shape
    rows, columns, _, features = kernel.shape
    taps = x.reshape(-1, channels) @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    taps = jnp.pad(taps.reshape(n, height, width, -1), ((0, 0), *padding, (0, 0)))
    out = [height + sum(padding[0]) - rows + 1, width + sum(padding[1]) - columns + 1]
    return sum(
        taps[:, i : i + out[0], j : j + out[1], features * (columns * i + j) :][..., :features]
        for i, j in itertools.product(range(rows), range(columns))
    )


def _narrow_gradients(x, kernel, cotangent, padding):
    """The gradients of :func:`_sum_of_shifted`, with the cotangents of all taps side by side."""
    n, height, width, channels = x.shape
    rows, columns, _, features = kernel.shape
    around = [(*pads, 0) for pads in _around((rows, columns), padding)]
    wide = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), ((0, 0, 0), *around, (0, 0, 0)))
    shifted = [
        wide[:, rows - 1 - i : rows - 1 - i + height, columns - 1 - j : columns - 1 - j + width]
        for i, j in itertools.product(range(rows), range(columns))
    ]
    of_taps = jnp.concatenate(shifted, axis=-1).reshape(n * height * width, -1)
    to_kernel = (x.reshape(-1, channels).T @ of_taps).reshape(channels, rows, columns, features)
    to_x = of_taps @ kernel.transpose(0, 1, 3, 2).reshape(-1, channels)
    return to_x.reshape(x.shape), to_kernel.transpose(1, 2, 0, 3)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, padding):
    return _depthwise_convolution(x, kernel, strides, padding)


def _depthwise_forward(x, kernel, strides, padding):
    return _depthwise_convolution(x, kernel, strides, padding), (x, kernel)


def _depthwise_backward(strides, padding, residuals, cotangent):
    return _depthwise_gradients(*residuals, cotangent, strides, padding)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@partial(jax.jit, static_argnums=(2, 3))
def _depthwise_convolution(x, kernel, strides, padding):
    def shifted(x, kernel):
        return _sum_of_taps(_padded(x, padding), kernel, strides)

    return by_platform(x, kernel, cpu=shifted, default=partial(_plain_depthwise, strides=strides, padding=padding))


@partial(jax.jit, static_argnums=(3, 4))
def _depthwise_gradients(x, kernel, cotangent, strides, padding):
    def shifted(x, kernel, cotangent):
        to_x = _depthwise_to_x(x.shape, kernel, cotangent, strides, padding)
        return to_x, _depthwise_to_kernel(_padded(x, padding), kernel.shape, cotangent, strides)

    def plain(x, kernel, cotangent):
        return jax.vjp(partial(_plain_depthwise, strides=strides, padding=padding), x, kernel)[1](cotangent)

    return by_platform(x, kernel, cotangent, cpu=shifted, default=plain)


def _plain_depthwise(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_NHWC, feature_group_count=x.shape[3]
    )


def _padded(x, padding, strides=(1, 1)):
    """``x`` with zeros around it, and between its pixels where there are strides, as an array.

    XLA would rather compute it, and what it comes from, anew wherever it is read, which is once for each tap.
    """
    widths = [(*around, stride - 1) for around, stride in zip(padding, strides, strict=True)]
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *widths, (0, 0, 0))))


def _sum_of_taps(padded, kernel, strides):
    """The depthwise convolution, every tap of the kernel times the pixels that it meets."""
    rows, columns = kernel.shape[:2]
    height, width = (size - taps + 1 for size, taps in zip(padded.shape[1:3], (rows, columns), strict=True))
    taps = [
        padded[:, i : i + height : strides[0], j : j + width : strides[1]] * kernel[i : i + 1, j : j + 1]
        for i, j in itertools.product(range(rows), range(columns))
    ]
    return lax.optimization_barrier(sum(taps))  # lest each of its readers computes it for itself


def _depthwise_to_x(shape, kernel, cotangent, strides, padding):
    """The gradient to the image: the cotangent, spread by the strides, convolved with the turned kernel."""
    around = []
    for size, taps, (low, _), pulled, stride in zip(
        shape[1:3], kernel.shape, padding, cotangent.shape[1:3], strides, strict=False
    ):
        before, spread = taps - 1 - low, stride * (pulled - 1) + 1
        around.append((before, size + taps - 1 - before - spread))
    return _sum_of_taps(_padded(cotangent, around, strides), kernel[::-1, ::-1], (1, 1))


def _depthwise_to_kernel(padded, kernel_shape, cotangent, strides):
    """The gradient to a depthwise kernel: for every tap, products of pixels and cotangents, summed.

    Rows of the output come one after the other, each with all taps, so that what it takes lies in the cache; sums over
    a row's pixels are left to the end. XLA's own sums over pixels are four to ten times as slow, and its gradient of
    the convolution as much again.
    """
    rows, columns, _, channels = kernel_shape
    samples, height, width, _ = cotangent.shape
    span = strides[1] * (width - 1) + 1

    def add_row(index, sums):
        sample, row = index // height, index % height
        window = (1, rows, padded.shape[2], channels)
        met = lax.dynamic_slice(padded, (sample, strides[0] * row, 0, 0), window)[0]
        pulled = lax.dynamic_slice(cotangent, (sample, row, 0, 0), (1, 1, width, channels))[0]
        return [before + met[:, j : j + span : strides[1]] * pulled for j, before in enumerate(sums)]

    nothing = jnp.zeros((rows, width, channels), padded.dtype)
    sums = lax.fori_loop(0, samples * height, add_row, [nothing] * columns)
    return jnp.stack([jnp.sum(of_column, 1) for of_column in sums], axis=1)[:, :, None]
