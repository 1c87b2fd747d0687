"""What the kernels are written on, Pallas' Triton backend, and all that differs there between versions of JAX.

JAX 0.11 deprecated this backend; ``docs/gpu.md`` says what may come after it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Where there is no GPU: what is lowered is the same for all that Triton serves, and this is the one JAX 0.10 takes.
_NAMED_GPU = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
_LEAST_CAPABILITY = 8.0  # Ampere; XLA would find out when it compiles
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


@contextlib.contextmanager
def lowering(platform: str = "cuda") -> Iterator[None]:
    """Within, kernels can be traced and lowered: on machines without a GPU, and without JAX's notice of the end.

    A test notices the end itself (``tests/kernels/test_backend.py``).

    Args:
      platform: that is lowered for, ``"cuda"`` or ``"rocm"``.

    Raises:
      NotImplementedError: if the machine's GPU is one that XLA's compiler takes no kernel of this backend for.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if platform == "cuda" and capability and float(capability) < _LEAST_CAPABILITY:
        raise NotImplementedError(f"GPUs of compute capability {capability}, allowed are {_LEAST_CAPABILITY} and up")
    with warnings.catch_warnings(), _a_gpu():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


def _a_gpu() -> contextlib.AbstractContextManager[Any]:
    """A GPU that is but named, if JAX asks for one (since 0.11) and there is none."""
    if hasattr(plgpu, "get_gpu_info"):
        try:
            plgpu.get_gpu_info()
        except ValueError:
            return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=_NAMED_GPU))
    return contextlib.nullcontext()
