"""Which GPU a kernel is lowered for, and where JAX's versions differ there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax

# Where there is no GPU: what is lowered is the same for all that Triton serves, and this is the one JAX 0.10 takes.
_NAMED_GPU = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Within, kernels can be traced and lowered: on machines without a GPU, and without JAX's notice of Triton's end.

    A test notices the end itself (``tests/kernels/test_triton.py``).
    """
    with warnings.catch_warnings(), _a_gpu():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


def _a_gpu() -> contextlib.AbstractContextManager[Any]:
    """A GPU that is but named, if JAX asks for one (since 0.11, for Triton) and there is none."""
    with contextlib.suppress(ImportError):
        from jax.experimental.pallas import triton

        if hasattr(triton, "get_gpu_info"):
            try:
                triton.get_gpu_info()
            except ValueError:
                mesh = jax.sharding.get_abstract_mesh()
                return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=_NAMED_GPU))
    return contextlib.nullcontext()


def check_capability(least: float) -> None:
    """Raises a ``NotImplementedError`` on a machine whose NVIDIA GPU is older: the compiler would fail, or abort."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    if capability.replace(".", "").isdigit() and float(capability) < least:  # AMD's are names
        raise NotImplementedError(f"this GPU has compute capability {capability}, allowed are {least} and up")
