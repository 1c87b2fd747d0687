"""What an optimised HLO program moves at the places where activations are quantized."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(, .*)?$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BYTES = re.compile(r"\d+")
# An activation that is quantized in the forward pass: below a module of the model, not transposed.
_SITE = re.compile(r"(?<!transpose\()jvp\(\w+\)/([\w/]+)/jit\(_fake_quant\)")
_NORM = "/norm/"
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
_CHAIN = ("reduce", "round-nearest-even", "clamp")


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Sites(NamedTuple):
    """What a program does where activations are quantized in the forward pass.

    Attributes:
      kernels: launches of the fused kernel.
      others: other launches that take part: of the unfused form, and of the norm before the quantizer.
      unfused: those of them that reduce or round, as the unfused form does.
      moved_bytes: operands and results of all.
    """

    kernels: int
    others: int
    unfused: int
    moved_bytes: int


def moved_bytes(hlo: str) -> int:
    """Operands and results of all launches of an optimised program."""
    computations, entry = _parsed(hlo)
    launches = {launch.name: launch for launch in computations[entry]}
    return sum(_moved(launch, launches) for launch in launches.values() if launch.opcode not in _FREE)


def sites(hlo: str, kernel: str) -> Sites:
    """Reads them off an optimised program's text.

    Args:
      hlo: the text.
      kernel: name of the fused kernel.
    """
    computations, entry = _parsed(hlo)
    launches = {launch.name: launch for launch in computations[entry]}

    def inside(launch):
        called = re.search(r"calls=%([\w.\-]+)", launch.rest)
        return [launch, *(computations[called[1]] if called else [])]

    def before(launch):
        """Launches that ``launch`` reads from and that are a part of the norm before it."""
        for name in launch.operands:
            producer = launches[name]
            if producer.opcode in _FREE:
                yield from before(producer)
            elif producer.opcode == "fusion" and any(_NORM in part.rest for part in inside(producer)):
                yield producer

    taking_part: dict[str, _Instruction] = {}
    waiting = [launch for launch in launches.values() if any(_SITE.search(part.rest) for part in inside(launch))]
    waiting = [launch for launch in waiting if launch.opcode not in _FREE]
    while waiting:
        launch = waiting.pop()
        if launch.name not in taking_part:
            taking_part[launch.name] = launch
            waiting.extend(before(launch))

    kernels = [launch for launch in taking_part.values() if launch.opcode == "custom-call" and kernel in launch.rest]
    others = [launch for launch in taking_part.values() if launch not in kernels]
    chain = [
        launch for launch in others if any(part.opcode in _CHAIN and _SITE.search(part.rest) for part in inside(launch))
    ]
    moved = sum(_moved(launch, launches) for launch in taking_part.values())
    return Sites(len(kernels), len(others), len(chain), moved)


def _parsed(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation, and the name of the one that is run."""
    computations: dict[str, list[_Instruction]] = defaultdict(list)
    current = entry = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            entry = current if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            name, shape, opcode, operands, rest = instruction.groups()
            found = _Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), rest or "")
            computations[current].append(found)
    return computations, entry


def _moved(launch: _Instruction, launches: dict[str, _Instruction]) -> int:
    return _size(launch.shape) + sum(_size(launches[name].shape) for name in set(launch.operands))


def _size(shape: str) -> int:
    return sum(
        math.prod(map(int, filter(None, dimensions.split(",")))) * _item_size(dtype)
        for dtype, dimensions in _SHAPE.findall(shape)
    )


def _item_size(dtype: str) -> int:
    bits = _BYTES.search(dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
