"""Pickles from anyone, read without running anything in them.

A pickle is a program, of which this understands what builds plain values. What it wants called is
looked up in a table that the reader of files of a kind gives; whatever else it names is
:class:`Unread`: it stays there as a name, and nothing is imported, called or made of it.
"""

from __future__ import annotations

import itertools
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Literal

import numpy as np

from granq_jax.errors import InputError

_MAX_ARGUMENTS = 8
_MAX_OPCODES = 1 << 18  # each may make an object; a batch of CIFAR-100 takes 200,000
_MAX_NUMBER = 1 << 18  # of a key: it is that of a parameter or an epoch


class Unread:
    """Something that a pickle names and that is not read, or an object made by it.

    Attributes:
      name: ``module name``, as in ``"argparse Namespace"``.
      state: what the pickle says of the object's attributes, if it does.
    """

    __slots__ = ("name", "state")  # a small file may name many

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None


class PickledArray:
    """A NumPy array that a pickle describes.

    Attributes:
      shape: its shape.
      dtype: the name of its dtype.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = ""
        self._content: Any = b""
        self._order: Literal["C", "F"] = "C"
        self._numbers = np.dtype(np.uint8)

    def build(self, state: Any) -> None:
        """Takes what NumPy wrote of the array: version, shape, dtype, whether in Fortran order, numbers."""
        _version, self.shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not _is_shape(self.shape):
            raise InputError("it describes an array that is none")
        self._numbers = dtype.read()
        self.dtype, self._content = self._numbers.name, as_bytes(content)
        self._order = "F" if fortran else "C"

    def read(self) -> np.ndarray:
        """The array. Raises an ``InputError`` if there are more or fewer numbers than it has."""
        if len(self._content) != math.prod(self.shape) * self._numbers.itemsize:
            raise InputError(f"it holds another number of bytes than an array of shape {self.shape} takes")
        return np.frombuffer(self._content, self._numbers).reshape(self.shape, order=self._order)


class _Dtype:
    """NumPy's dtype of whole or real numbers."""

    def __init__(self, kind: Any, *_: Any):
        self._kind, self._order = as_text(kind), "="

    def build(self, state: Any) -> None:
        self._order = as_text(state[1])

    def read(self) -> np.dtype:
        if self._kind[:1] not in ("b", "i", "u", "f") or not self._kind[1:].isdecimal() or self._order not in "<>|=":
            raise InputError(f"it holds an array of dtype {self._kind[:20]!r}, allowed are numbers")
        return np.dtype(self._kind).newbyteorder(self._order)


def _scalar(dtype: Any, content: Any = None) -> Any:
    """A number of NumPy's as one of Python's; of another kind it is unread."""
    try:
        return np.frombuffer(as_bytes(content), dtype.read())[0].item()
    except Exception:  # whatever is wrong with it, nothing but itself depends on it
        return Unread("numpy scalar")


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    """What NumPy calls in pickles of protocol 5."""
    array = PickledArray()
    array.build((1, shape, dtype, order == "F", content))
    return array


def _is_shape(shape: Any) -> bool:
    return type(shape) is tuple and len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)


def as_bytes(value: Any) -> bytes:
    """What Python 2 or 3 pickled as a row of bytes: ``bytes``, or text of as many characters."""
    return value.encode("latin-1") if type(value) is str else bytes(memoryview(value))


def as_text(value: Any) -> Any:
    """What Python 2 or 3 pickled as a name: ``bytes`` become text, the rest stays what it is."""
    return value.decode("latin-1") if type(value) is bytes else value


# What NumPy's arrays are made by, before and since NumPy 2.
NUMPY: dict[str, Callable[..., Any]] = {
    "numpy dtype": _Dtype,
    "_codecs encode": lambda text, _: as_bytes(text),  # bytes, in a protocol that has none,
    "__builtin__ bytes": lambda: b"",  # and none of them
    **{f"numpy.{core}.multiarray _reconstruct": lambda *_: PickledArray() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _array_of_buffer for core in ("core", "_core")},
}


# Opcodes that put a value on the stack.
_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Unread("a set"),
}


def unpickle(
    stream: BinaryIO, functions: Mapping[str, Any], persistent: Callable[[tuple[Any, ...]], Any] | None = None
) -> Any:
    """The object that a pickle describes, in time and memory proportional to its length.

    Args:
      stream: in memory; is read to the pickle's end.
      functions: what the pickle may name, by ``module name``: functions, and the classes of objects with
        a method ``build`` that takes their state. The rest is :class:`Unread`.
      persistent: makes an object of what is said of one that lies outside the pickle.

    Raises:
      Exception: of any kind, for a pickle that is damaged or has an opcode that builds no plain value.

    Examples:
      >>> import io, pickle
      >>> unpickle(io.BytesIO(pickle.dumps({"lr": [0.1, 0.01]})), {})
      {'lr': [0.1, 0.01]}
      >>> unpickle(io.BytesIO(pickle.dumps(print)), {}).name
      'builtins print'
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

    def key(value: Any) -> Any:
        # Others could take long to compare, and no file of numbers has them where it matters.
        plain = type(value) in (str, bytes) or (type(value) is int and 0 <= value < _MAX_NUMBER)
        return value if plain else Unread("a key")

    def set_items(items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if type(stack[-1]) is dict:
            stack[-1].update(zip(map(key, keys), values, strict=True))
        elif not isinstance(stack[-1], Unread):
            raise InputError("it sets an item of something that has none")

    def append(items: list[Any]) -> None:
        if type(stack[-1]) is list:
            stack[-1].extend(items)
        elif not isinstance(stack[-1], Unread):
            raise InputError("it appends to something that is no list")

    def named(name: Any) -> Any:
        return functions[name] if type(name) is str and name in functions else Unread(str(name))

    def called(function: Any, arguments: Any) -> Any:
        if isinstance(function, Unread):
            return Unread(function.name)
        if not callable(function) or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise InputError("it calls a function in another way than files of its kind do")
        return function(*arguments)

    for opcode, argument, _ in itertools.islice(pickletools.genops(stream), _MAX_OPCODES):
        if opcode.name in _VALUES:
            stack.append(argument)
            continue
        if opcode.name in _MADE:
            stack.append(_MADE[opcode.name]())
            continue
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(int(opcode.name[-1]))))
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "POP":
                stack.pop()
            case "POP_MARK":
                to_mark()
            case "FROZENSET":
                to_mark()
                stack.append(Unread("a set"))
            case "APPEND":
                append([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                append(to_mark())
            case "SETITEM":
                set_items(popped(2))
            case "SETITEMS":
                set_items(to_mark())
            case "GLOBAL":
                stack.append(named(argument))
            case "STACK_GLOBAL":
                module, name = popped(2)
                if type(module) is not str or type(name) is not str:
                    raise InputError("it names something by what is no text")
                stack.append(named(f"{module} {name}"))
            case "BINPERSID" if persistent is not None:
                described = stack.pop()
                if type(described) is not tuple or len(described) > _MAX_ARGUMENTS:
                    raise InputError("it describes something outside of it in another way than files of its kind do")
                stack.append(persistent(described))
            case "REDUCE" | "NEWOBJ":
                stack.append(called(*popped(2)))
            case "NEWOBJ_EX":
                made, _arguments, _keywords = popped(3)
                stack.append(Unread(made.name if isinstance(made, Unread) else "an object"))
            case "BUILD":
                # The state of plain values is attributes that no number depends on.
                state = stack.pop()
                if isinstance(stack[-1], PickledArray | _Dtype):
                    stack[-1].build(state)
                elif isinstance(stack[-1], Unread):
                    stack[-1].state = state
            case _:
                raise InputError(f"it has the pickle opcode {opcode.name}, which files of its kind do not have")
    raise InputError(f"it has a pickle without an end, or of more than {_MAX_OPCODES} steps")
