"""Compiled programs kept between runs, so that a second one starts at once."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import platformdirs

OFF = "off"
# Half a second is what the smaller programs of a run take to compile.
_MIN_COMPILE_SECONDS = 0.5


def use_compilation_cache(directory: str = "") -> None:
    """Switches JAX's persistent compilation cache on; for the whole process, before it compiles.

    Args:
      directory: where programs are kept. ``""`` leaves what JAX has been told already (by
        ``JAX_COMPILATION_CACHE_DIR``, say), and is otherwise a directory in the user's cache, or
        none if that cannot be written to; ``"off"`` keeps none.

    Raises:
      ValueError: for a ``directory`` that cannot be written to.

    Example::

      use_compilation_cache()
    """
    if directory == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not directory and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    path = Path(directory).absolute() if directory else platformdirs.user_cache_path("granq-jax") / "compiled"
    if not _is_writable(path):
        if directory:
            raise ValueError(
                f"--compilation-cache: got {directory!r}, allowed are directories that can be written to, and {OFF!r}"
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def _is_writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)
