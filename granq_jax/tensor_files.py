"""Tensors by name from files that may come from anyone.

A file only says what it holds until a tensor is asked for: names, shapes and dtypes are looked at
first, so that what does not fit costs no memory. Nothing in a file is ever run. PyTorch's own
files are read here as well, without PyTorch: what they need of pickle is a few opcodes and four
functions. (PyTorch's reader takes whatever memory a file asks for, ``weights_only`` or not.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors

from granq_jax.archives import open_zip

_MAX_HEADER_BYTES = 1 << 18  # names, shapes and places of all tensors; ResNet-50's take 60 kB
_MAX_DIMENSIONS = 32
_MAX_ARGUMENTS = 8
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch before 1.6


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


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[dict[str, StoredTensor]]:
    with open_zip(path) as archive:
        yield {info.filename.removesuffix(".npy"): _npy(archive, info) for info in archive.infolist()}


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredTensor:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):  # what NumPy writes unless a header is longer than 64 kB
            raise ValueError(f"{info.filename!r} is of version {version}, allowed is (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        start = member.tell()

    def read():
        size = math.prod(shape) * dtype.itemsize
        with archive.open(info) as member:
            member.read(start)
            data = member.read(size)
            if len(data) != size or member.read(1):  # reading to the end also checks the checksum
                raise ValueError(f"{info.filename!r} holds another number of bytes than its shape {shape} takes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")

    return StoredTensor(shape, dtype.name, read)


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` of a file whose header is not absurdly long."""
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size} bytes, allowed are up to {_MAX_HEADER_BYTES}")
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
def _pth(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        file.seek(0)
        if not zipped:
            yield _legacy_pth(file)
            return
    with open_zip(path) as archive:
        yield _zipped_pth(archive)


def _zipped_pth(archive: zipfile.ZipFile) -> Any:
    """What ``torch.save`` writes since PyTorch 1.6: a pickle, and a member for each storage."""
    pickles = [info.filename for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it is a zip file with {len(pickles)} members data.pkl, allowed is one")
    folder = pickles[0].removesuffix("data.pkl")

    def beginning(name: str) -> bytes:
        with archive.open(folder + name) as member:
            return member.read(_MAX_HEADER_BYTES)

    if f"{folder}byteorder" in archive.namelist() and beginning("byteorder") != b"little":
        raise ValueError("its numbers are not in little-endian order")

    @functools.lru_cache(maxsize=1)  # tensors that share a storage follow each other
    def content(key: str) -> bytes:
        info = archive.getinfo(f"{folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:  # stored, it takes no more memory than the file has bytes
            raise ValueError(f"{info.filename!r} is compressed, which PyTorch's files are not")
        return archive.read(info)

    def storage(kind: Any, dtype: Any, key: Any, place: Any, size: Any) -> _Storage:
        return _Storage(dtype, key, size, content)

    return _unpickle(io.BytesIO(beginning("data.pkl")), storage)


def _legacy_pth(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote before: five pickles, then length and content of each storage."""
    head = io.BytesIO(file.read(_MAX_HEADER_BYTES))
    end = file.seek(0, os.SEEK_END)
    storages: dict[str, _Storage] = {}
    starts: dict[str, int] = {}

    @functools.lru_cache(maxsize=1)
    def content(key: str) -> bytes:
        file.seek(starts[key])
        length = int.from_bytes(file.read(8), "little")
        return file.read(storages[key].bytes) if length == storages[key].size else b""

    def storage(kind: Any, dtype: Any, key: Any, place: Any, size: Any, view: Any) -> _Storage:
        if view is not None:
            raise ValueError("it holds a storage that is a view of another one")
        return storages.setdefault(key, _Storage(dtype, key, size, content))

    if _unpickle(head) != _LEGACY_MAGIC:
        raise ValueError("it does not begin as PyTorch's files do")
    _protocol, system, tensors, keys = (_unpickle(head, storage) for _ in range(4))
    if not system["little_endian"]:
        raise ValueError("its numbers are not in little-endian order")
    position = head.tell()
    for key in keys:
        if type(key) is not str:
            raise ValueError("it describes a storage that is none")
        starts[key] = position
        position += 8 + storages[key].bytes
    if position != end:
        raise ValueError(f"it has {end} bytes, but its storages end at {position}")
    return tensors


class _Storage:
    """A row of numbers that tensors are views of; ``content(key)`` gives its bytes."""

    def __init__(self, dtype: Any, key: Any, size: Any, content: Callable[[str], bytes]):
        if not isinstance(dtype, np.dtype) or type(key) is not str or type(size) is not int or size < 0:
            raise ValueError("it describes a storage that is none")
        self.dtype, self.size, self.bytes = dtype, size, size * dtype.itemsize
        self._key, self._content = key, content

    def read(self) -> np.ndarray:
        """The numbers, (size,)."""
        content = self._content(self._key)
        if len(content) != self.bytes:
            raise ValueError(f"storage {self._key!r} has {len(content)} bytes instead of {self.bytes}")
        return np.frombuffer(content, self.dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("it describes a tensor that is none")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"it describes a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("it describes a tensor with an offset, shape or stride that is no whole number from 0")
    reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and reach > storage.size:
        raise ValueError(f"it describes a tensor that reaches to number {reach} of a storage of {storage.size}")

    def read():
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, steps, writeable=False)

    return StoredTensor(shape, storage.dtype.name, read)


def _is_small(key: Any) -> bool:
    """Whether ``key`` is a number of a parameter, as keys of an optimizer's state are."""
    return type(key) is int and 0 <= key < _MAX_HEADER_BYTES


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
# All that a pickle may name. An OrderedDict is empty when it is made, its items are set after that.
_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch {name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


def _unpickle(stream: BinaryIO, storage: Callable[..., _Storage] | None = None) -> Any:
    """The object that a pickle of PyTorch's describes, in time and memory proportional to its length.

    Args:
      stream: is read to the pickle's end.
      storage: makes a storage of what PyTorch says of one in the pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def popped(count: int) -> list[Any]:
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def to_mark() -> list[Any]:
        return popped(len(stack) - marks.pop())

    def set_items(items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if type(stack[-1]) is not dict or not all(type(key) is str or _is_small(key) for key in keys):
            raise ValueError("it sets an item whose key is neither text nor a number of a parameter")
        stack[-1].update(zip(keys, values, strict=True))

    def few(arguments: Any) -> tuple[Any, ...]:
        if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise ValueError("it calls a function with other arguments than PyTorch's files do")
        return arguments

    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                items = to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                set_items(popped(2))
            case "SETITEMS":
                set_items(to_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise ValueError(f"it needs {argument!r}, which is not allowed")
                stack.append(_GLOBALS[argument])
            case "BINPERSID" if storage is not None:
                stack.append(storage(*few(stack.pop())))
            case "REDUCE":
                function, arguments = popped(2)
                stack.append(function(*few(arguments)))
            case "BUILD":
                stack.pop()  # attributes of an OrderedDict: versions of modules, which nothing depends on
            case _:
                raise ValueError(f"it has the pickle opcode {opcode.name}, which PyTorch's files do not have")
    raise ValueError("it has a pickle without an end")


# By suffix: a context in which a file is open and what it holds is there, for a file of tensors a
# dict of ``StoredTensor`` by name. They and ``StoredTensor.read`` raise exceptions of any kind.
READERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Any]]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pth": _pth,
    ".pt": _pth,
}
