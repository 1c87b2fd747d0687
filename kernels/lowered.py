"""A kernel where it can be lowered, another form elsewhere: decided when a program is lowered, not when it is traced.

Only then are the platform and the GPU known; and a kernel that is not wanted is never traced, nor its backend imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from granq_jax.kernels.gpus import lowering
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PLATFORMS = ("cuda", "rocm")
_LOGGER = logging.getLogger(__name__)
_said: set[type[Exception]] = set()  # kinds of errors; that of another array tells nothing new


class NoKernelError(ValueError):
    """A kernel was asked for, and cannot be lowered."""


class _SlowerError(Exception):
    """A kernel was not asked for, and is slower than the form it would take the place of."""


_form_will_do: ContextVar[bool] = ContextVar("form_will_do", default=False)


def give_way_unless(faster: bool) -> None:
    """To be called by a kernel when it is traced: if it is not faster than its other form, that takes its place.

    Nothing happens where the kernel is required, or is called by itself.
    """
    if _form_will_do.get() and not faster:
        raise _SlowerError


def kernel_or(form: Callable[..., Any], kernel: Callable[..., Any], *operands: Any, required: bool = False) -> Any:
    """``kernel(*operands)`` in programs for GPUs, where it can be lowered, unless it gives way; else ``form`` of them.

    Both return arrays of the same shapes and dtypes. Derivatives are those of ``form``.

    Args:
      form: in plain JAX.
      kernel: launches of :mod:`granq_jax.kernels`.
      *operands: pytrees of arrays.
      required: whether ``form`` must not take the kernel's place.

    Raises:
      NoKernelError: when a program is lowered, if the kernel is required and cannot be lowered.
    """
    leaves, structure = jax.tree.flatten(operands)

    def flat(function):
        return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    results = _kernel_or.bind(*leaves, form=flat(form), kernel=flat(kernel), required=required)
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(form, *operands)), results)


_kernel_or = Primitive("kernel_or")
_kernel_or.multiple_results = True


@_kernel_or.def_impl
def _run(*leaves, **how):
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_kernel_or.bind, **how))(*leaves)


@_kernel_or.def_abstract_eval
def _shapes(*leaves, form, kernel, required):
    return jax.make_jaxpr(form)(*leaves).out_avals


def _batched(leaves, axes, *, form, kernel, required):
    mapped = {"form": jax.vmap(form, axes), "kernel": jax.vmap(kernel, axes)}
    results = _kernel_or.bind(*leaves, **mapped, required=required)
    return results, [0] * len(results)


def _differentiated(primals, tangents, *, form, kernel, required):
    return jax.jvp(form, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _lowered_form(context, *leaves, form, kernel, required):
    if required:
        platforms = context.platforms or context.module_context.platforms
        raise NoKernelError(_refusal(f"there are kernels for {', '.join(PLATFORMS)}, not for {', '.join(platforms)}"))
    return mlir.lower_fun(form)(context, *leaves)


def _lowered_kernel(context, *leaves, form, kernel, required):
    token = _form_will_do.set(not required)
    try:
        # On one device's part: what it is a part of, of which avals know, is nothing to a kernel.
        avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        with lowering():
            return mlir.lower_fun(kernel)(context.replace(avals_in=avals), *leaves)
    except _SlowerError:
        pass
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if required:
            raise NoKernelError(_refusal(why)) from error
        _say_once(type(error), why)
    finally:
        _form_will_do.reset(token)
    return mlir.lower_fun(form)(context, *leaves)


def _refusal(why):
    return f"impl: got 'pallas', which cannot be lowered here ({why}), allowed are 'auto' and 'xla'"


def _say_once(kind, why):
    if kind not in _said:
        _said.add(kind)
        _LOGGER.warning("A kernel cannot be lowered here, so XLA's form computes, which is slower on a GPU (%s)", why)


batching.primitive_batchers[_kernel_or] = _batched
ad.primitive_jvps[_kernel_or] = _differentiated
mlir.register_lowering(_kernel_or, _lowered_form)
for _platform in PLATFORMS:
    mlir.register_lowering(_kernel_or, _lowered_kernel, platform=_platform)
