"""Which implementation computes: the kernels or XLA's form.

The kernels are imported where they are traced. They import Pallas, which takes time, and a JAX that has their backend
no longer computes all else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from granq_jax.kernels.lowered import NoKernelError as NoKernelError
from granq_jax.kernels.lowered import kernel_or
from granq_jax.runtime.platforms import on_cpus_only

IMPLEMENTATIONS = ("auto", "xla", "pallas", "pallas_interpret")
KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# What quantizes activations with nothing fused on a GPU: "triton", or "mosaic" where that kernel covers them. It
# compiles, and computes what it should in interpret mode, but no GPU has run it.
_PLAIN = "triton"


def on_mosaic() -> bool:
    """Whether Mosaic GPU's kernel is taken where there is one."""
    return _PLAIN == "mosaic"


def has_kernel(x: jax.Array, granularity: str) -> bool:
    """Whether there is a kernel for arrays like ``x``; XLA computes others whatever is asked for."""
    if x.size == 0 or x.dtype not in KERNEL_DTYPES:
        return False
    return (granularity == "sample_channel" and x.ndim >= 3) or (granularity == "out_channel" and x.ndim >= 2)


def dispatch(impl: str, by_xla: Callable[..., Any], by_kernel: Callable[..., Any], *operands: Any) -> Any:
    """Computes one of two functions of ``operands``, which return the same.

    Args:
      impl: ``"xla"``; ``"pallas"``, the kernel; ``"pallas_interpret"``, the kernel run by Pallas'
        interpreter; ``"auto"``, decided when the program is lowered: for CUDA and ROCm the kernel where it is known
        to be the faster one (:func:`granq_jax.kernels.tiles.faster`), else XLA. Where the kernel cannot be lowered,
        ``"auto"`` takes XLA and logs why, once, and ``"pallas"`` raises.
      by_xla: of the operands.
      by_kernel: of the operands and ``interpret``.
      *operands: pytrees of arrays.

    Raises:
      NoKernelError: a ``ValueError``, when a program is lowered for which the kernel is required and cannot be had.
    """
    if impl == "xla":
        return by_xla(*operands)
    if impl == "pallas_interpret":
        return by_kernel(*operands, interpret=True)
    if impl == "auto" and on_cpus_only():
        return by_xla(*operands)
    return kernel_or(by_xla, partial(by_kernel, interpret=False), *operands, required=impl == "pallas")
