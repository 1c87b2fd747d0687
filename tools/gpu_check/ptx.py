"""What a kernel's PTX says of it: registers, spills, shared memory, and what it moves."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from granq_jax.kernels.tiles import VECTOR_BYTES, Tiling

from tools.gpu_check.targets import Program

_ACCESS = re.compile(r"(@%p\d+ )?\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)")
_GENERIC_ACCESS = re.compile(r"\b(?:ld|st)(?:\.v(\d))?\.[busf](\d+)")
_LABEL = re.compile(r"^(\$L__BB\w+):", re.M)
_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);")
_ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
_LAUNCH = re.compile(r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), .*shared_memory: (\d+) bytes")


class Kernel(NamedTuple):
    """A kernel as compiled.

    Attributes:
      registers: of a thread.
      spilled_bytes: stored to local memory for want of registers.
      shared_bytes: of shared memory, a program.
      reads: bytes read from global memory by the whole launch, by the width of a thread's access. Every
        instruction is counted for all threads, as often as its loop goes round.
      writes: the same of what is written. Of a number a channel, which all threads but one leave to that one
        by a predicate, one is counted.
      tests_nan: whether it holds a test for NaN.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    reads: Counter[int]
    writes: Counter[int]
    tests_nan: bool

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        return self.reads.total() + self.writes.total()


def inspect(program: Program, tiling: Tiling) -> Kernel:
    """The launches of ``program``, one or two, whose tiles are those of ``tiling``, taken together."""
    modules = [part for part in re.split(r"(?m)^(?=\.version)", program.ptx) if _ENTRY.search(part)]
    launches = {name: tuple(map(int, numbers)) for name, *numbers in _LAUNCH.findall(program.launches)}
    logs = [_assemble(module) for module in modules]
    moved: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for module in modules:
        (name,) = _ENTRY.findall(module)
        *grid, threads, _ = launches[name]
        loops = _loops(module)
        for access in _ACCESS.finditer(module):
            predicate, kind, vector, bits = access.groups()
            width = int(vector or 1) * int(bits) // 8
            rounds = tiling.loops if any(start < access.start() < end for start, end in loops) else 1
            taking_part = threads
            if predicate and not tiling.ragged:
                # Either one thread for each channel's number, or what there is of the last tile.
                one_a_channel = kind == "st" and width < VECTOR_BYTES and int(bits) == 32 and not vector
                taking_part = tiling.columns if one_a_channel else threads * tiling.last_rows // tiling.tile_rows
            moved[kind][width] += math.prod(grid) * width * rounds * taking_part
    return Kernel(
        registers=max(int(found) for log in logs for found in re.findall(r"Used (\d+) registers", log)),
        spilled_bytes=sum(int(found) for log in logs for found in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=max(shared for *_, shared in launches.values()),
        reads=moved["ld"],
        writes=moved["st"],
        tests_nan=bool(re.search(r"setp\.nan\.(bf16|f16|f32)", program.ptx)),
    )


def mosaic_faults(ptx: str) -> list[str]:
    """What is not as it should be with a kernel that Mosaic GPU made; its loads do not say that they are global."""
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", _assemble(ptx))))
    widths = {int(vector or 1) * int(bits) // 8 for vector, bits in _GENERIC_ACCESS.findall(ptx)}
    checks = {
        f"{spilled} bytes spilled": spilled > 0,
        f"accesses of {sorted(widths)} bytes a thread": widths != {VECTOR_BYTES},
        "minimum or maximum passes over NaN": bool(re.search(r"\b(min|max)\.(bf16|f16|f32)", ptx)),
    }
    return [fault for fault, holds in checks.items() if holds]


def _loops(ptx: str) -> list[tuple[int, int]]:
    """Where loops begin and end: at a label, and at the jump back to it."""
    labels = {label[1]: label.start() for label in _LABEL.finditer(ptx)}
    jumps = [(labels[jump[1]], jump.start()) for jump in _JUMP.finditer(ptx)]
    return [(start, end) for start, end in jumps if start < end]


def _assemble(ptx: str) -> str:
    """What ``ptxas -v`` says."""
    spec = importlib.util.find_spec("nvidia")
    places = map(Path, (spec.submodule_search_locations or []) if spec else [])
    found = (str(path) for place in places for path in place.glob("*/bin/ptxas"))  # cuda_nvcc of CUDA 12, cu13
    ptxas = next(found, shutil.which("ptxas"))
    if ptxas is None:
        raise ImportError("there is no ptxas: pip install 'granq-jax[gpu-check]'")
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.M)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name", target, str(source), "-o", str(Path(directory, "kernel.cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
