"""Zip files that may come from anyone."""

from __future__ import annotations

import os
import zipfile

from granq_jax.errors import InputError

_ENTRY_SIGNATURE = b"PK\1\2"
_MAX_ENTRIES = 10_000  # ResNet-50 has 320 tensors
_CHUNK_BYTES = 1 << 20


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens a zip file to read; its members are then read piece by piece, never extracted by name.

    Raises:
      InputError: if it lists more members than a checkpoint has, which ``zipfile`` would make an
        object for each of, or one that is packed in a way whose unpacking cannot be stopped early
        (``zipfile`` inflates, but does not otherwise decompress, piece by piece).
      zipfile.BadZipFile, OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        entries, tail = 0, b""
        while chunk := file.read(_CHUNK_BYTES):
            entries += (tail + chunk).count(_ENTRY_SIGNATURE)
            tail = chunk[-len(_ENTRY_SIGNATURE) + 1 :]
            if entries > _MAX_ENTRIES:
                raise InputError(f"it lists over {_MAX_ENTRIES} members")
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archive.close()
            raise InputError(f"{member.filename!r} is compressed in another way than by deflation")
    return archive
