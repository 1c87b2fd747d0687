"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from granq_jax.runtime.processes import is_first


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` to ``path`` as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | bytearray) -> int:
    """Writes ``content`` to ``path`` at once: a reader sees the old file or the whole new one.

    Of several processes, the first does so.

    Returns:
      How many bytes there are.
    """
    if is_first():
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    return len(content)
