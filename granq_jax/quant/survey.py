"""A survey of a model: which layers are called, and how their weights lie in its variables. Nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax

from granq_jax.quant.collecting import is_array, over_arrays
from granq_jax.quant.layers import LAYERS, WEIGHT, Layout, layer_call

Interceptor = Callable[..., Any]
_tokens = itertools.count()


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


def applied(
    model: nn.Module, interceptor: Interceptor, token: str, variables: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """``model.apply`` under an interceptor.

    ``nn.jit`` keeps what it has traced, whatever intercepts it; but not if what may be changed differs.

    Args:
      model: a module.
      interceptor: see ``nn.intercept_methods``.
      token: the name of a collection that there is not; calls with one token are taken for equal.
      variables: of the model.
      args: of its call.
      kwargs: of ``apply``.
    """
    mutable = kwargs.get("mutable", False)
    if mutable is True:
        named: Any = flax.core.DenyList([token])
    elif isinstance(mutable, flax.core.DenyList):
        named = flax.core.DenyList([*_names(mutable.deny), token])
    else:
        named = [*_names(mutable or ()), token]
    with nn.intercept_methods(interceptor):
        outputs, changed = model.apply(variables, *args, **{**kwargs, "mutable": named})
    if mutable is False:
        return outputs
    return outputs, {name: collection for name, collection in changed.items() if name != token}


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def own_token() -> str:
    """A token that no other call has."""
    return f"granq_jax_{next(_tokens)}"


@functools.lru_cache(maxsize=1024)
def token_of(*how: Any) -> str:
    """The token of calls that are intercepted in the same way."""
    return own_token()


def of_calls(interceptor: Interceptor) -> Interceptor:
    """An interceptor of each call of a module alone, once.

    What a class inherits and calls by ``super()`` is part of its own call. A class that a transform has made
    (``nn.remat(nn.Dense)``) calls the one that it was made of, on arrays as that one sees them: that is the call.
    """
    active: list[nn.Module] = []

    def intercept(next_call, args, kwargs, context):
        module = context.module
        is_call = context.method_name == "__call__" and module.scope is not None
        if not is_call or _is_made_by_transform(type(module)) or any(module is other for other in active):
            return next_call(*args, **kwargs)
        active.append(module)
        try:
            return interceptor(next_call, args, kwargs, context)
        finally:
            active.pop()

    return intercept


def _is_made_by_transform(cls: type[nn.Module]) -> bool:
    owner = next(c for c in cls.__mro__ if "__call__" in vars(c))
    return owner.__module__ == nn.transforms.__name__


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called on: its first argument, by position or by name."""
    return args[0] if args else kwargs.get("inputs", next(iter(kwargs.values()), None))


def with_first_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a module with another :func:`first_input`."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    name = "inputs" if "inputs" in kwargs else next(iter(kwargs))
    return (), {**kwargs, name: x}


def einsum_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The string that an ``nn.Einsum`` is called with, if it is one and is."""
    if not isinstance(module, nn.Einsum):
        return None
    return args[1] if len(args) > 1 else kwargs.get("einsum_str")


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
    shapes = _shapes(arguments[0])
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


def _shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(variables.get("params", {}))
    return {"/".join(path[:-1]): leaf.shape for path, leaf in flat.items() if path[-1] == WEIGHT}


def _boxed(variables: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """``variables`` with the weights of ``paths`` tracked."""
    flat = flax.traverse_util.flatten_dict(variables["params"])
    flat = {path: _Tracked(x) if path[-1] == WEIGHT and "/".join(path[:-1]) in paths else x for path, x in flat.items()}
    return {**variables, "params": flax.traverse_util.unflatten_dict(flat)}
