"""Paths as they are typed."""

from __future__ import annotations

import os
from pathlib import Path

from granq_jax.errors import InputError


def expanded(path: str | os.PathLike, field: str) -> Path:
    """``path``, where ``~`` and ``~USER`` at its beginning are homes: a shell leaves that in ``--flag=~/file`` undone.

    Raises:
      InputError: that names ``field``, if there is no such user.

    Examples:
      >>> expanded("runs/a", "workdir"), expanded("~/runs", "workdir") == Path.home() / "runs"
      (PosixPath('runs/a'), True)
    """
    # Not Path's own, for which ./~ begins with a tilde.
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise InputError(
            f"{field}: got {str(path)!r}, but whose home that is is not known; a name may begin so as './~...'"
        )
    return Path(text)
