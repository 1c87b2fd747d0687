"""Tensors by name from files that may come from anyone.

A file only says what it holds until a tensor is asked for: names, shapes and dtypes are looked at
first, so that what does not fit costs no memory. Nothing in a file is ever run. What kind a file is
of is seen from its content, whatever its name. PyTorch's own files are read here as well, without
PyTorch: what they need of pickle is a few opcodes and four functions, see :mod:`granq_jax.files.pickles`.
(PyTorch's reader takes whatever memory a file asks for, ``weights_only`` or not.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors

from granq_jax.errors import InputError
from granq_jax.files.archives import open_zip
from granq_jax.files.pickles import NUMPY, unpickle

# Names, shapes and places of all tensors, and what else a training script keeps. ResNet-50's take 60 kB.
MAX_HEADER_BYTES = 1 << 22
_MAX_DIMENSIONS = 32
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # of PyTorch before 1.6
_MAGIC_WITHIN = 32  # bytes: after the pickle's protocol, and perhaps a frame


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that is open.

    Attributes:
      shape: of the tensor.
      dtype: name of its dtype: NumPy's, or the format's for one that NumPy does not have.
      read: reads it. Raises an exception of some kind if the file does not hold it whole.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def joined(keys: Iterable[str]) -> str:
    """One name for the keys on the way to an array in a tree; :func:`split_name` gives them back.

    Examples:
      >>> joined(("params", "Dense_0/kernel", "scale"))
      'params/Dense_0%2Fkernel/scale'
    """
    return "/".join(key.replace("%", "%25").replace("/", "%2F") for key in keys)


def split_name(name: str) -> tuple[str, ...]:
    """The keys of which :func:`joined` made ``name``.

    Examples:
      >>> split_name("params/Dense_0%2Fkernel/scale")
      ('params', 'Dense_0/kernel', 'scale')
    """
    return tuple(key.replace("%2F", "/").replace("%25", "%") for key in name.split("/"))


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredTensor:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):  # what NumPy writes unless a header is longer than 64 kB
            raise InputError(f"{info.filename!r} is of version {version}, allowed is (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        start = member.tell()

    def read():
        size = math.prod(shape) * dtype.itemsize
        with archive.open(info) as member:
            member.read(start)
            data = member.read(size)
            if len(data) != size or member.read(1):  # reading to the end also checks the checksum
                raise InputError(f"{info.filename!r} holds another number of bytes than its shape {shape} takes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")

    return StoredTensor(shape, dtype.name, read)


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` of a file whose header is not absurdly long."""
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise InputError(f"its header has {size} bytes, allowed are up to {MAX_HEADER_BYTES}")
    with safetensors.safe_open(path, framework="numpy") as file:
        yield file


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[dict[str, StoredTensor]]:
    with open_safetensors(path) as file:

        def tensor(name):
            described = file.get_slice(name)
            dtype = described.get_dtype()
            return StoredTensor(
                tuple(described.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype), lambda: file.get_tensor(name)
            )

        yield {name: tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is not iterable)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Opens a file; gives what it holds: for a file of tensors a dict of them by name.

    They are ``StoredTensor`` or, of NumPy's arrays in a pickle, ``PickledArray``, which has the same
    attributes. PyTorch's files may hold any plain values around them, see :func:`granq_jax.files.pickles.unpickle`.

    Raises:
      Exception: of any kind, as the tensors' ``read`` does, for a file that is damaged, or of another
        kind than ``.npz``, ``.safetensors``, PyTorch's and pickles of NumPy's arrays.
    """
    with path.open("rb") as file:
        begin = file.read(_BEGIN_BYTES)
        file.seek(0)
        # A header's length may begin as any other kind of file does, but headers are far below 4 GB.
        is_safetensors = begin[8:9] == b"{" and (begin[4:8] == bytes(4) or not begin.startswith(b"\x80"))
        if begin.startswith(b"\x80") and not is_safetensors:
            is_pytorchs = _LEGACY_MAGIC in begin[:_MAGIC_WITHIN]
            yield _legacy_pth(file) if is_pytorchs else unpickle(io.BytesIO(file.read()), _FUNCTIONS)
            return
    if begin.startswith(b"PK\3\4"):
        with open_zip(path) as archive:
            yield _zipped(archive)
    elif is_safetensors:
        with _safetensors(path) as tensors:
            yield tensors
    else:
        raise InputError(_other_kind(begin))


_BEGIN_BYTES = 512
_OTHER_KINDS = (
    (0, b"\x89HDF", "it is an HDF5 file, as Keras writes them"),
    (0, b"\x1f\x8b", "it is compressed by gzip: unpack it"),
    (257, b"ustar", "it is a tar archive: unpack it"),
)


def _other_kind(begin: bytes) -> str:
    signs = (words for place, sign, words in _OTHER_KINDS if begin[place:].startswith(sign))
    words = next(signs, "it is of another kind" if begin else "it is empty")
    return f"{words}; allowed are .npz, .safetensors and PyTorch's files"


def _zipped(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            "it holds a TorchScript program, which would have to run; save the state_dict() of its model instead"
        )
    if any(name.endswith("/data.pkl") for name in names):
        return _zipped_pth(archive)
    if within := [name for name in names if not name.endswith((".npy", "/"))]:
        raise InputError(f"it is a zip file that holds {within[0][:_SHOWN]!r}: unpack it")
    return {info.filename.removesuffix(".npy"): _npy(archive, info) for info in archive.infolist()}


_SHOWN = 80


def _zipped_pth(archive: zipfile.ZipFile) -> Any:
    """What ``torch.save`` writes since PyTorch 1.6: a pickle, and a member for each storage."""
    pickles = [info.filename for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"it is a zip file with {len(pickles)} members data.pkl, allowed is one")
    folder = pickles[0].removesuffix("data.pkl")

    def whole(name: str) -> bytes:
        size = archive.getinfo(folder + name).file_size
        if size > MAX_HEADER_BYTES:
            raise InputError(f"its member {name} has {size} bytes, allowed are up to {MAX_HEADER_BYTES}")
        with archive.open(folder + name) as member:
            return member.read(MAX_HEADER_BYTES)

    if f"{folder}byteorder" in archive.namelist() and whole("byteorder") != b"little":
        raise InputError("its numbers are not in little-endian order")

    @functools.lru_cache(maxsize=1)  # tensors that share a storage follow each other
    def content(key: str) -> bytes:
        info = archive.getinfo(f"{folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:  # stored, it takes no more memory than the file has bytes
            raise InputError(f"{info.filename!r} is compressed, which PyTorch's files are not")
        return archive.read(info)

    def storage(described: tuple[Any, ...]) -> _Storage:
        _kind, dtype, key, _place, size = described
        return _Storage(dtype, key, size, content)

    return unpickle(io.BytesIO(whole("data.pkl")), _FUNCTIONS, storage)


def _legacy_pth(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote before: five pickles, of which the first is a number, then each storage."""
    head = io.BytesIO(file.read(MAX_HEADER_BYTES))
    end = file.seek(0, os.SEEK_END)
    storages: dict[str, _Storage] = {}
    starts: dict[str, int] = {}

    @functools.lru_cache(maxsize=1)
    def content(key: str) -> bytes:
        file.seek(starts[key])
        length = int.from_bytes(file.read(8), "little")
        return file.read(storages[key].bytes) if length == storages[key].size else b""

    def storage(described: tuple[Any, ...]) -> _Storage:
        _kind, dtype, key, _place, size, view = described
        if view is not None:
            raise InputError("it holds a storage that is a view of another one")
        return storages.setdefault(key, _Storage(dtype, key, size, content))

    _magic, _protocol, system, tensors, keys = (unpickle(head, _FUNCTIONS, storage) for _ in range(5))
    if not system["little_endian"]:
        raise InputError("its numbers are not in little-endian order")
    position = head.tell()
    for key in keys:
        if type(key) is not str:
            raise InputError("it describes a storage that is none")
        starts[key] = position
        position += 8 + storages[key].bytes
    if position != end:
        raise InputError(f"it has {end} bytes, but its storages end at {position}")
    return tensors


class _Storage:
    """A row of numbers that tensors are views of; ``content(key)`` gives its bytes."""

    def __init__(self, dtype: Any, key: Any, size: Any, content: Callable[[str], bytes]):
        if not isinstance(dtype, np.dtype) or type(key) is not str or type(size) is not int or size < 0:
            raise InputError("it describes a storage that is none")
        self.dtype, self.size, self.bytes = dtype, size, size * dtype.itemsize
        self._key, self._content = key, content

    def read(self) -> np.ndarray:
        """The numbers, (size,)."""
        content = self._content(self._key)
        if len(content) != self.bytes:
            raise InputError(f"storage {self._key!r} has {len(content)} bytes instead of {self.bytes}")
        return np.frombuffer(content, self.dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise InputError("it describes a tensor that is none")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise InputError(f"it describes a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise InputError("it describes a tensor with an offset, shape or stride that is no whole number from 0")
    reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and reach > storage.size:
        raise InputError(f"it describes a tensor that reaches to number {reach} of a storage of {storage.size}")

    def read():
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, steps, writeable=False)

    return StoredTensor(shape, storage.dtype.name, read)


_STORAGES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": jnp.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
# What a pickle may have called. Dictionaries are empty when they are made, their items are set after that.
_FUNCTIONS: dict[str, Any] = {
    **NUMPY,
    "collections OrderedDict": lambda: {},
    "collections defaultdict": lambda *_: {},
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, *_: tensor,
    **{f"torch {name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()},
}
