"""Which form of a computation is traced, all that there are or the one where it will run, and how it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

# How JAX calls them.
_PRECISIONS = {"default": None, "float32": "float32", "tf32": "tensorfloat32"}
PRECISIONS = tuple(_PRECISIONS)
_on_cpus_only = jax.make_user_context(False)  # part of the key under which JAX keeps traces


def traced_for(devices: Sequence[jax.Device]) -> AbstractContextManager[None]:
    """Within, what is traced need run on these devices only: on CPUs alone the forms of others are left out.

    They would be dropped when the program is lowered, but tracing them took a tenth of a second of the joint step's.

    Examples:
      >>> with traced_for(jax.devices("cpu")):
      ...     jaxpr = jax.make_jaxpr(lambda x: by_platform(x, cpu=jax.lax.sin, default=jax.lax.cos))(0.0)
      >>> [str(equation.primitive) for equation in jaxpr.eqns]
      ['sin']
    """
    return _on_cpus_only(all(device.platform == "cpu" for device in devices))


def on_cpus_only() -> bool:
    """Whether :func:`traced_for` says so."""
    return _on_cpus_only.value


def by_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """One of several functions of ``operands`` that return the same, chosen when the program is lowered.

    Args:
      *operands: pytrees of arrays.
      default: for platforms that have no form of their own.
      **forms: by platform, such as ``cpu`` or ``cuda``.

    Examples:
      >>> by_platform(jax.numpy.ones(2), cpu=lambda x: x + x, default=lambda x: 2 * x).tolist()
      [2.0, 2.0]
    """
    if on_cpus_only():
        return forms.get("cpu", default)(*operands)
    return jax.lax.platform_dependent(*operands, default=default, **forms)


def multiplied_in(precision: str) -> AbstractContextManager[None]:
    """Within, products and convolutions of float32 arrays are traced with a precision.

    Args:
      precision: ``"float32"``; ``"tf32"``, factors of 10 bits of fraction, which GPUs multiply several times as
        fast, and CPUs as if nothing had been said; ``"default"``, as ``jax_default_matmul_precision`` says.

    Examples:
      >>> with multiplied_in("float32"):
      ...     jaxpr = jax.make_jaxpr(jax.numpy.dot)(1.0 * jax.numpy.ones(2), jax.numpy.ones(2))
      >>> "HIGHEST" in str(jaxpr)
      True
    """
    name = _PRECISIONS[precision]
    return nullcontext() if name is None else jax.default_matmul_precision(name)
