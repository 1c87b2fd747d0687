"""What the kernels are written on: Pallas' Triton backend.

JAX 0.11 deprecated it; ``docs/gpu.md`` says what may come after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from granq_jax.kernels.gpus import check_capability
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_LEAST_CAPABILITY = 8.0  # Ampere
load, store, program_id, ds = plgpu.load, plgpu.store, pl.program_id, pl.ds
BlockSpec = pl.BlockSpec


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    warps: int,
    interpret: bool,
) -> Callable[..., Any]:
    """``pl.pallas_call`` of a kernel that keeps no more than one stage of a loop in flight."""
    if not interpret:
        check_capability(_LEAST_CAPABILITY)
    return pl.pallas_call(
        kernel,
        # Not as it comes: within jax.shard_map that would have to tell over which axes it varies.
        out_shape=jax.tree.map(lambda array: jax.core.ShapedArray(array.shape, array.dtype), out_shape),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name=name,
    )
