"""Writes PyTorch's checkpoint files without PyTorch, right ones and wrong ones."""

import dataclasses
import io
import struct
import zipfile
from typing import Any

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


@dataclasses.dataclass(frozen=True)
class Call:
    """What a pickle calls when it is read: ``module name`` with ``arguments``."""

    function: str
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of the storage ``key``; what is not given is as it should be for ``array``."""

    array: np.ndarray
    key: str
    legacy: bool = False
    size: int | None = None
    offset: Any = 0
    shape: Any = None
    strides: Any = None
    view_of: Any = None

    def parts(self):
        array, kind = self.array, f"torch {_STORAGES[self.array.dtype.name]}Storage"
        described = ("storage", Raw(_global(kind)), self.key, "cpu", array.size if self.size is None else self.size)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        view = (
            Raw(_pickled(described + (self.view_of,) * self.legacy) + b"Q"),
            self.offset,
            array.shape if self.shape is None else self.shape,
            strides if self.strides is None else self.strides,
        )
        return Call("torch._utils _rebuild_tensor_v2", (*view, False, Call("collections OrderedDict", ())))


def _global(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _pickled(value):
    match value:
        case Raw():
            return value.code
        case Call():
            return _global(value.function) + _pickled(value.arguments) + b"R"
        case Tensor():
            return _pickled(value.parts())
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple() | list():
            begin, end = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
            return begin + b"".join(map(_pickled, value)) + end
        case dict():
            return b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def pickled(value):
    """A pickle of ``value``, protocol 2."""
    return b"\x80\x02" + _pickled(value) + b"."


def tensors_of(arrays, legacy=False):
    """``arrays`` by name as PyTorch describes them, and the content of their storages."""
    described = {name: Tensor(array, str(i), legacy) for i, (name, array) in enumerate(arrays.items())}
    return described, {str(i): np.ascontiguousarray(array).tobytes() for i, array in enumerate(arrays.values())}


def zipped(value, storages, compression=zipfile.ZIP_STORED, more=(), byteorder=b"little"):
    """A file as PyTorch writes it since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else pickled(value))
        archive.writestr("archive/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in more:
            archive.writestr(name, content)
    return file.getvalue()


def legacy(value, storages, itemsize=4, little_endian=True):
    """A file as PyTorch wrote it before."""
    system = {"protocol_version": 1001, "little_endian": little_endian}
    head = b"".join(map(pickled, (LEGACY_MAGIC, 1001, system)))
    body = (value if isinstance(value, bytes) else pickled(value)) + pickled(list(storages))
    sizes = (struct.pack("<q", len(content) // itemsize) + content for content in storages.values())
    return head + body + b"".join(sizes)
