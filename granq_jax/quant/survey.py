"""A survey of a model: which layers are called, and how their weights lie in its variables. Nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax

from granq_jax.errors import InputError
from granq_jax.quant.calls import applied, einsum_of, first_input, of_calls, own_token
from granq_jax.quant.collecting import is_array, over_arrays
from granq_jax.quant.layers import LAYERS, WEIGHT, Layout, is_activation, is_of_class, kernels, layer_call
from granq_jax.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
      calls: path and class of each module that was called, in that order.
      layouts: of the weight of each layer that was called, by the path of its module.
      unknown: paths of layers with a weight whose output features cannot be told, each with the reason.
      is_lifted: whether a module was called inside a transform (``nn.jit``, ``nn.scan`` and so on), which
        arrays cannot simply leave.
    """

    calls: tuple[tuple[str, type[nn.Module]], ...]
    layouts: Mapping[str, Layout]
    unknown: Mapping[str, str]
    is_lifted: bool

    def check_matched(self, spec: QuantSpec, name: str) -> None:
        """Raises an ``InputError`` if a part of ``spec`` matches nothing, or a weight that cannot be quantized.

        Args:
          spec: how the model is to be quantized.
          name: of the model's class.
        """
        if spec.weight_bits is not None and not self.layouts and not self.unknown:
            raise InputError(
                f"QuantSpec.weight_bits: {name} has no parameter named {WEIGHT!r} to quantize: of the layers of "
                f"flax.linen ({', '.join(layer.__name__ for layer in LAYERS)}) none was called"
            )
        if spec.placement == "operand":
            activations = [path for path, cls in self.calls if issubclass(cls, LAYERS)]
        else:
            activations = [path for path, cls in self.calls if is_activation(cls, spec)]
        if spec.act_bits is not None and not activations:
            what = "no Activation module" if spec.placement == "activation" else "no convolution or dense layer"
            raise InputError(
                f"QuantSpec.placement: {spec.placement!r} matches nothing in {name}: {what} was called. "
                "Allowed are placement='operand', or placement='activation' with the model's own activation "
                f"classes named in activation_modules; the layers with weights are {', '.join(self.layouts)}"
            )
        for wanted in spec.activation_modules:
            if not any(is_of_class(cls, wanted) for _, cls in self.calls):
                raise InputError(
                    f"QuantSpec.activation_modules: no module of class {wanted!r} was called in {name}; "
                    f"the activations that were met are {', '.join(activations) or 'none'}"
                )
        spec.check_overrides_match([*self.layouts, *self.unknown], activations)
        for path, reason in self.unknown.items():
            if spec.at(path).weight_bits is not None:
                raise InputError(
                    f"QuantSpec.weight_bits: the weight of {path!r} cannot be quantized: {reason}; leave it in full "
                    f"precision with the override ({f'^{re.escape(path)}$'!r}, dict(weight_bits=None))"
                )


def surveyed(model: nn.Module, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
    """A survey of ``model.apply(variables, *args, **kwargs)``; of equal calls there is one."""
    call = _Call.of(model, variables, args, kwargs)
    try:
        return _surveyed(call)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return _survey(call)


class _Call(NamedTuple):
    """A call without the values of its arrays: hashable if the model and the other arguments are."""

    model: nn.Module
    tree: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        leaves, tree = jax.tree.flatten((variables, args, kwargs))
        return cls(model, tree, tuple(_Array(x.shape, x.dtype) if is_array(x) else x for x in leaves))


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any


@functools.lru_cache(maxsize=32)
def _surveyed(call: _Call) -> Survey:
    return _survey(call)


class _Tracked(flax.struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A variable in a box that Flax's transforms tell which axes they take away."""

    value: Any
    removed: tuple[int, ...] = flax.struct.field(default=(), pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Tracked:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Tracked:
        return self.replace(removed=self.removed[:-1])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Tracked:
        return self.replace(removed=(*self.removed, index))


def _survey(call: _Call) -> Survey:
    layouts: dict[str, Layout] = {}
    unknown: dict[str, str] = {}
    calls: dict[tuple[str, type[nn.Module]], None] = {}
    levels: list[Any] = []  # of the trace that each module was called in
    shapes_met: dict[str, tuple[int, ...]] = {}

    def interceptor(next_call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        levels.append(module.scope.trace_level)
        calls[path, type(module)] = None
        if isinstance(module, LAYERS):
            weight: Any = module.get_variable("params", WEIGHT)
            x = first_input(args, kwargs)
            if weight is not None and is_array(x):
                note(path, module, weight, x, einsum_of(module, args, kwargs))
        return next_call(*args, **kwargs)

    def note(path, module, weight, x, einsum):
        removed = weight.removed if isinstance(weight, _Tracked) else ()
        shape = shapes_met[path] = nn.meta.unbox(weight).shape
        layout = layer_call(module, shape, x.ndim, einsum).layout
        found = None if layout is None else layout.under(removed)
        if found is None:
            unknown[path] = f"{type(module).__name__} does not tell which axes of {shape} are output features"
        elif layouts.setdefault(path, found) != found:
            unknown[path] = "it is read in two ways"

    def trace(box):
        def run(variables, args, kwargs):
            return applied(call.model, of_calls(interceptor), own_token(), box(variables), args, kwargs)

        of_arrays, arrays = over_arrays(run, *arguments)
        jax.eval_shape(of_arrays, *arrays)

    leaves = [_shape(x) if isinstance(x, _Array) else x for x in call.leaves]
    arguments = jax.tree.unflatten(call.tree, leaves)
    trace(lambda variables: variables)
    shapes = {path: leaf.shape for path, leaf in kernels(arguments[0].get("params", {})).items()}
    cut = [path for path, shape in shapes_met.items() if shape != shapes.get(path)]
    if cut:
        for path in cut:
            layouts.pop(path, None)
        trace(functools.partial(_boxed, paths=cut))
        for path in cut:
            if path in layouts and layouts[path].ndim != len(shapes[path]):
                unknown[path] = f"it is made of an array of shape {shapes[path]} in a way that cannot be followed"
    return Survey(
        tuple(calls),
        {path: layout for path, layout in layouts.items() if path not in unknown},
        unknown,
        any(level != levels[0] for level in levels),
    )


def _shape(x):
    """Shape and dtype of ``x`` as JAX takes it: NumPy's float64 is float32 to it, unless it is told otherwise."""
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return jax.ShapeDtypeStruct(x.shape, x.dtype if is_key else jax.dtypes.canonicalize_dtype(x.dtype))


def _boxed(variables: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """``variables`` with the weights of ``paths`` tracked."""
    flat = flax.traverse_util.flatten_dict(variables["params"])
    flat = {path: _Tracked(x) if path[-1] == WEIGHT and "/".join(path[:-1]) in paths else x for path, x in flat.items()}
    return {**variables, "params": flax.traverse_util.unflatten_dict(flat)}
