"""What a run puts on record beside its metrics."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from granq_jax.errors import InputError
from granq_jax.runs import names
from granq_jax.runtime.processes import is_first

_PACKAGES = ("granq-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record_start(workdir: Path, command: str) -> None:
    """Adds a line to ``starts.jsonl``: who works on this run from now on. Of several processes, the first does so.

    Args:
      workdir: of the run.
      command: as it was typed, ``""`` for a call from a program.
    """
    if not is_first():
        return
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "directory": os.getcwd(),
        "versions": versions(),
        "devices": [str(device) for device in jax.devices()],
    }
    with (workdir / names.STARTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def check_writable(workdir: Path) -> None:
    """Raises an ``InputError`` if ``workdir``, which need not exist, cannot be written to; leaves nothing there."""
    try:
        if not workdir.is_dir() and os.path.lexists(workdir):
            raise NotADirectoryError("it is a file")
        with contextlib.suppress(FileNotFoundError):
            os.stat(workdir)  # raises for names that cannot be
        existing = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass  # os.access knows of permissions only, and of none for root
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"workdir: {str(workdir)!r} cannot be written to ({reason}), allowed is a directory that can, or a new one"
        ) from error


def describe(config: ConfigDict) -> dict[str, Any]:
    """The fields by which a result says what was quantized, and how."""
    of_both = (f"{kind}_{field}" for kind in ("weight", "act") for field in ("bits", "granularity", "ranges"))
    quant = (*of_both, "placement")
    return {
        "dataset": config.dataset,
        "network": config.network,
        **{key: config.quant[key] for key in quant},
        "seed": config.seed,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}


def peak_rss_mb() -> float | None:
    """The most memory this process has held, in MB; ``None`` on Windows, which has no such record."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
