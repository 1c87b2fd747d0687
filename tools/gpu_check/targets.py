"""GPUs to compile for where there is none, by XLA's compiler for CUDA."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What XLA has to know of a GPU, as OpenXLA publishes it (xla/backends/gpu/target_config/specs).
_COMMON = """
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
"""
_DEVICES = {
    "h100": (
        "NVIDIA H100 80GB HBM3",
        """shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
        clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
        cuda_compute_capability { major: 9 }""",
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        """shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108 fpus_per_core: 64
        clock_rate_ghz: 1.41 memory_bandwidth: 2039040000000 l2_cache_size: 41943040 device_memory_size: 85100068864
        cuda_compute_capability { major: 8 }""",
    ),
}
GPUS = tuple(_DEVICES)
_FILES = "module_*"


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      hlo: as XLA optimised it.
      ptx: of its kernels.
      launches: what it runs, one line a launch, with grid, threads and shared memory.
      temporary_bytes: of device memory.
    """

    hlo: str
    ptx: str
    launches: str
    temporary_bytes: int


def devices(gpu: str, count: int = 1) -> list[jax.Device]:
    """``count`` GPUs of one kind, which exist for the compiler only.

    Raises:
      ImportError: if the compiler is not installed.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to be checked
    name, specification = _DEVICES[gpu]
    target = f'gpu_device_info {{ {_COMMON} {specification} }} platform_name: "CUDA" device_description_str: "{name}"'
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, topology=f"1x1x{count}", target_config=target
        )
    except Exception as error:
        raise ImportError(
            f"XLA's compiler for CUDA cannot be used: pip install 'granq-jax[gpu-check]' ({error})"
        ) from None
    return list(topology.devices)


def compiled(lowered: jax.stages.Lowered) -> Program:
    """Compiles what was lowered for :func:`devices`."""
    with tempfile.TemporaryDirectory() as directory:
        # An XLA from jax 0.11 on writes PTX only if that is asked for.
        program = lowered.compile(compiler_options={"xla_dump_to": directory, "xla_dump_emitter_re": "ptx"})
        made = sorted(Path(directory).glob(_FILES))
        ptx = "".join(path.read_text() for path in made if path.suffix == ".ptx")
        launches = "".join(path.read_text() for path in made if path.name.endswith(".thunk_sequence.txt"))
    hlo, memory = program.as_text(), program.memory_analysis()
    if hlo is None or memory is None:
        raise RuntimeError("this version of XLA's compiler says nothing of its programs")
    return Program(hlo, ptx, launches, memory.temp_size_in_bytes)


def compiled_for(gpu: str, function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> Program:
    """Compiles ``function`` for one GPU."""
    return compiled(jax.jit(function).trace(*_placed(gpu, arguments)).lower())


def compiled_by_mosaic(gpu: str, function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> str:
    """The PTX of the one Mosaic GPU kernel that ``function`` launches, which XLA has another compiler make."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["MOSAIC_GPU_DUMP_TO"] = directory
        try:
            jax.jit(function).trace(*_placed(gpu, arguments)).lower().compile()
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        (path,) = Path(directory).glob("*.ptx")
        return path.read_text()


def _placed(gpu: str, arguments: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    sharding = NamedSharding(Mesh(np.array(devices(gpu)), ("device",)), PartitionSpec())
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
