"""What is known of linen's layers: which axes of their weight are output features, which of their input channels.

And which modules are activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util

from granq_jax.models.layers import Activation
from granq_jax.quant.grouping import Grouping, plain_grouping
from granq_jax.quant.spec import QuantSpec, kept_axes

LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
WEIGHT = "kernel"  # what the weight of each of them is called


def kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are called what weights are, by the ``/``-joined path of their module."""
    flat = flax.traverse_util.flatten_dict(params)
    return {"/".join(keys[:-1]): leaf for keys, leaf in flat.items() if keys[-1] == WEIGHT}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are what; all others are summed over.

    Attributes:
      ndim: of the weight.
      outputs: axes of output features.
      inputs: of a convolution, the axis of input channels, for which ``"kernel"`` has ranges of their own.
      stacked: axes along which the weights of several layers lie, as ``nn.scan`` and ``nn.vmap`` stack them.
    """

    ndim: int
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is that of an unstacked ``nn.Conv`` or ``nn.Dense``: (..., I, O)."""
        return self == plain_layout(self.ndim)

    def kept_axes(self, granularity: str) -> tuple[int, ...]:
        """The axes along which every index has a range of its own, see :func:`granq_jax.quant.spec.kept_axes`."""
        kept = {"out_channel": self.outputs, "kernel": self.inputs + self.outputs, "tensor": ()}[granularity]
        return tuple(sorted(self.stacked + kept))

    def ranges(self, shape: Sequence[int], granularity: str) -> int:
        """How many ranges a weight of ``shape`` has."""
        count = 1
        for axis in self.kept_axes(granularity):
            count *= shape[axis]
        return count

    def under(self, removed: Sequence[int]) -> Layout:
        """That of the whole weight, from that of one layer, which transforms have taken the axes ``removed`` from.

        Args:
          removed: by the outermost transform first; each counted in what those before it have left.

        Examples:
          >>> plain_layout(2).under((0,))
          Layout(ndim=3, outputs=(2,), inputs=(), stacked=(0,))
        """
        left = list(range(self.ndim + len(removed)))
        stacked = tuple(left.pop(axis) for axis in removed)
        outputs, inputs = (tuple(left[axis] for axis in axes) for axes in (self.outputs, self.inputs))
        return Layout(self.ndim + len(removed), outputs, inputs, stacked)


def plain_layout(ndim: int) -> Layout:
    """That of a convolution's or dense layer's weight, (..., I, O)."""
    return Layout(ndim, (ndim - 1,), (ndim - 2,) if ndim > 2 else ())


class Operand(NamedTuple):
    """Which axes of a layer's input are what.

    Attributes:
      samples: the axis of samples; none where a transform has taken it.
      channels: axes of input features, which are summed over with the weight.
    """

    samples: tuple[int, ...]
    channels: tuple[int, ...]

    def grouping(self, ndim: int) -> Grouping:
        """The plain form of an input of ``ndim`` dimensions: (samples, ..., channels)."""
        if self == Operand((0,), (ndim - 1,)):
            return plain_grouping(ndim)
        rest = tuple(axis for axis in range(ndim) if axis not in self.samples + self.channels)
        return Grouping((self.samples, rest, self.channels))


class Call(NamedTuple):
    """A call of one of :data:`LAYERS`.

    Attributes:
      layout: of its weight; ``None`` where the class does not tell.
      operand: axes of its input; ``None`` where the class does not tell.
    """

    layout: Layout | None
    operand: Operand | None


def layer_call(module: nn.Module, weight_shape: Sequence[int] | None, ndim: int, einsum: str | None = None) -> Call:
    """What the axes of a layer's weight and input are, from its class and settings.

    Args:
      module: an instance of one of :data:`LAYERS`.
      weight_shape: of its parameter ``kernel``, if it has one.
      ndim: of its input.
      einsum: of an ``nn.Einsum``, the string it is called with, where it has none of its own.

    Examples:
      >>> heads = nn.DenseGeneral(8, axis=(-2, -1))
      >>> call = layer_call(heads, (2, 4, 8), 4)
      >>> call.layout.outputs, call.operand.channels
      ((2,), (2, 3))
      >>> layer_call(nn.ConvTranspose(6, (3, 3), transpose_kernel=True), (3, 3, 6, 5), 4).layout.outputs
      (2,)
    """
    if isinstance(module, nn.Einsum):
        return _einsum(module.einsum_str or einsum, weight_shape, ndim)
    if isinstance(module, nn.DenseGeneral):
        return _dense_general(module, weight_shape, ndim)
    if isinstance(module, nn.Dense):
        layout = plain_layout(2) if _ends_in(weight_shape, 2, (module.features,)) else None
        return Call(layout, Operand((0,), (ndim - 1,)))
    # A convolution. Its input has samples in front, or a transform has taken that axis.
    spatial = len(_as_tuple(module.kernel_size))
    operand = Operand((0,) if ndim > spatial + 1 else (), (ndim - 1,))
    layout = plain_layout(spatial + 2)
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        layout = Layout(layout.ndim, layout.inputs, layout.outputs)
    if weight_shape is None or len(weight_shape) != layout.ndim:
        return Call(None, operand)
    return Call(layout if weight_shape[layout.outputs[0]] == module.features else None, operand)


def _dense_general(module, weight_shape, ndim):
    features, axes, batch = (_as_tuple(field) for field in (module.features, module.axis, module.batch_dims))
    axes, batch = (tuple(axis % ndim for axis in field) for field in (axes, batch))
    size = len(batch) + len(axes) + len(features)
    layout = None
    if _ends_in(weight_shape, size, features):
        layout = Layout(size, (*range(len(batch)), *range(size - len(features), size)))
    return Call(layout, _operand({*axes, *batch}, ndim))


def _einsum(einsum, weight_shape, ndim):
    """Labels of the weight that are not summed over are its outputs; those of the input that it shares, channels."""
    operands, arrow, result = (einsum or "").replace(" ", "").partition("->")
    of_input, comma, of_weight = operands.partition(",")
    if not comma or "." in of_weight or weight_shape is None or len(of_weight) != len(weight_shape):
        return Call(None, None)
    if not arrow:  # NumPy's implicit form: what is there once
        result = "".join(label for label in of_input + of_weight if operands.count(label) == 1)
    front, _, end = of_input.partition("...")  # what the dots stand for lies between
    places = {label: i for i, label in enumerate(front)} | {
        label: ndim - len(end) + i for i, label in enumerate(end if "..." in of_input else "")
    }
    layout = Layout(len(of_weight), tuple(i for i, label in enumerate(of_weight) if label in result))
    return Call(layout, _operand({axis for label, axis in places.items() if label in of_weight}, ndim))


def _operand(channels, ndim):
    return Operand(() if 0 in channels else (0,), tuple(sorted(channels)))


def _ends_in(shape, ndim, features):
    return shape is not None and len(shape) == ndim and tuple(shape[-len(features) :]) == tuple(features)


def _as_tuple(field: Any) -> tuple[int, ...]:
    return (field,) if isinstance(field, int) else tuple(field)


def weight_grouping(layout: Layout, granularity: str) -> tuple[Grouping, str]:
    """The plain form of a weight and the granularity to quantize that with, for it to have the layout's ranges."""
    kept = layout.kept_axes(granularity)
    if kept == kept_axes(granularity, layout.ndim):
        return plain_grouping(layout.ndim), granularity
    rest = tuple(axis for axis in range(layout.ndim) if axis not in kept)
    return Grouping((rest, kept)), "out_channel"


def is_activation(cls: type[nn.Module], spec: QuantSpec) -> bool:
    """Whether outputs of modules of a class are activations, with ``placement="activation"``."""
    return any(is_of_class(cls, wanted) for wanted in (Activation, *spec.activation_modules))


def is_of_class(cls: type[nn.Module], wanted: str | type) -> bool:
    """Whether a class is ``wanted`` or derived from it, or has it for a name."""
    return issubclass(cls, wanted) if isinstance(wanted, type) else cls.__name__ == wanted
