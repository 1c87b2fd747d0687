"""What keeps compiling short: programs kept between runs, and those of a moment not optimized."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax
import platformdirs

from granq_jax.errors import InputError
from granq_jax.runtime.paths import expanded

OFF = "off"
# Options of programs that run a few times only, which so compile twice as fast and run a little slower.
COMPILED_FAST = {"xla_backend_optimization_level": 0}
# Half a second is what the smaller programs of a run take to compile.
_MIN_COMPILE_SECONDS = 0.5
_MAX_BYTES = 2 * 1024**3  # what was not used for longest goes first


def use_compilation_cache(directory: str = "") -> None:
    """Switches JAX's persistent compilation cache on; for the whole process, before it compiles.

    Args:
      directory: where programs are kept, 2 GiB at most. ``""`` leaves what JAX has been told already
        (by ``JAX_COMPILATION_CACHE_DIR``, say), and is otherwise a directory in the user's cache, one
        for each kind of CPU, or none if that cannot be written to; ``"off"`` keeps none.

    Raises:
      InputError: for a ``directory`` that cannot be written to.

    Example::

      use_compilation_cache()
    """
    jax.config.update("jax_enable_compilation_cache", directory != OFF)
    if directory == OFF:
        return
    if not directory and (told := jax.config.jax_compilation_cache_dir):  # type: ignore[attr-defined]
        if told.startswith("~"):
            jax.config.update("jax_compilation_cache_dir", str(expanded(told, "JAX_COMPILATION_CACHE_DIR")))
        return
    users = platformdirs.user_cache_path("granq-jax") / "compiled" / _kind_of_cpu()
    path = expanded(directory, "--compilation-cache").absolute() if directory else users
    if not _is_writable(path):
        if directory:
            raise InputError(
                f"--compilation-cache: got {directory!r}, allowed are directories that can be written to, and {OFF!r}"
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def _kind_of_cpu() -> str:
    """Machines may share a home, but not programs with instructions that another CPU lacks."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    instructions = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256(repr((platform.machine(), platform.processor(), instructions)).encode()).hexdigest()[:8]


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)
