"""Calls of a model's modules: how they are intercepted, and what they are called on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.linen as nn

Interceptor = Callable[..., Any]
_tokens = itertools.count()


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


def within(outer: Interceptor, inner: Interceptor) -> Interceptor:
    """An interceptor whose calls of modules go on to another one."""

    def intercept(next_call, args, kwargs, context):
        return outer(lambda *args, **kwargs: inner(next_call, args, kwargs, context), args, kwargs, context)

    return intercept
