"""What tracing, compiling and running a program leave in memory: what is looked through, given back, and kept."""

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Iterator

import jax

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
# What glibc lays out for a thread at a time.
_HEAP = 64 * 2**20
_CPU_OPTIONS: dict[str, str | bool] = {
    # Blocks of temporaries that fit into a heap: glibc can keep nothing larger for a thread.
    "xla_multiheap_size_constraint_per_heap": str(_HEAP - 4 * 2**20),
    # The order of operations that holds the least at once: 334 MB instead of 485 with CIFAR-100's batch, as fast.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Within, Python's garbage collector rests.

    Tracing makes many objects that stay and few that go, which it would look through again and again. The first
    step on CIFAR-10 came after 4.6 seconds instead of 4.9 with it at rest since the imports.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def compile_to_repeat(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """Compiles a program that will run again and again; on CPUs it then holds less, and keeps what it holds.

    XLA takes a program's temporaries anew each time. Where they come from the system, that clears them page by page,
    which took a sixth of a step. So from here on the C library, where it is glibc, keeps what the process frees.

    Args:
      lowered: what is compiled.
      platform: of its devices, such as ``"cpu"``.

    Examples:
      >>> compile_to_repeat(jax.jit(lambda x: x + 1).lower(1.0), "cpu")(2.0).item()
      3.0
    """
    if platform != "cpu":
        return lowered.compile()
    with warnings.catch_warnings():
        # XLA cannot store a program that has several blocks of temporaries: it is compiled at every start.
        warnings.filterwarnings("ignore", ".*persistent compilation cache.*Multiple temp buffer", UserWarning)
        try:
            compiled = lowered.compile(_CPU_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            compiled = lowered.compile()  # by an XLA that has given them up
    _glibc("malloc_trim", 0)  # what the compiler freed: 1.2 GB after the joint step of CIFAR-100
    _glibc("mallopt", _M_MMAP_MAX, 0)
    _glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)
    _glibc("mallopt", _M_TOP_PAD, _HEAP)  # or a thread's heap goes when all in it is free
    return compiled


def _glibc(function: str, *args: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        getattr(ctypes.CDLL("libc.so.6"), function)(*args)
