"""What is read off a kernel's PTX, on one made up for the purpose; the real compiler where it is installed."""

import importlib.util
import subprocess
import sys

import pytest
from granq_jax.kernels.tiles import Tiling

from tools.gpu_check import ptx
from tools.gpu_check.kernels import Case, Row, cases
from tools.gpu_check.ptx import inspect
from tools.gpu_check.targets import Program

PTX = """
.version 8.0
.target sm_90a
.visible .entry kernel(
.reqntid 64, 1, 1
$L__BB0_1:
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    setp.nan.f32 %p1, %f1, %f1;
    @%p2 bra $L__BB0_1;
    ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    st.global.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };
    @%p3 st.global.b32 [ %rd3 + 0 ], { %r5 };
"""
LAUNCHES = "001: kCustomKernel [source | sink] kernel grid: [2, 3, 1] threads: [64, 1, 1]  shared_memory: 512 bytes"
LOG = """ptxas info    : Function properties for kernel
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers"""


def test_what_a_kernel_moves(monkeypatch):
    monkeypatch.setattr(ptx, "_assemble", lambda text: LOG)
    # 17 tiles of 16 pixels: two loops of six, and five.
    tiling = Tiling(pixels=784, channels=24, columns=8, warps=2, rows=272)
    kernel = inspect(Program("", PTX, LAUNCHES, 0), tiling)
    programs, threads = 6, 64
    assert kernel.reads == {16: programs * threads * 16 * 2, 8: programs * threads * 8}
    assert kernel.writes == {16: programs * threads * 16, 4: programs * tiling.columns * 4}
    assert kernel.moved_bytes == programs * (threads * (32 + 8 + 16) + 32)
    assert (kernel.registers, kernel.spilled_bytes, kernel.shared_bytes, kernel.tests_nan) == (40, 12, 512, True)
    faults = " ".join(Row(Case("fake_quant", (2, 8, 5, 24), "float32"), "h100", kernel).faults)
    assert "12 bytes spilled" in faults
    assert "of the least" in faults
    assert "NaN" not in faults


@pytest.mark.slow
def test_cases_are_those_of_the_networks():
    found = cases()
    assert len(found) == len(set(found))
    names = {case.name for case in found}
    assert {"norm + residual + relu + fake_quant", "norm + relu6 + fake_quant", "quantize", "weight"} <= names
    assert {(16, 32, 32, 16), (16, 112, 112, 96), (16, 7, 7, 1280), (3, 3, 512, 512)} <= {case.shape for case in found}


@pytest.mark.slow
@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs the gpu-check extra",
)
def test_a_kernel_that_pads_is_found_out():
    """49 pixels in tiles of 16 without a mask: what the check must see."""
    script = """
import dataclasses, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
from tools.gpu_check.kernels import Case, compiled_row
from granq_jax.kernels import sweeps, triton
case = Case("fake_quant", (16, 7, 7, 64), "float32")
assert not compiled_row(case, "h100").faults
rows = case.tiling.tile_rows
sweeps.Block.place = lambda self, tile: sweeps.Place(triton.ds(tile * rows, rows), None)
assert compiled_row(dataclasses.replace(case, activation="relu"), "h100").faults
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
