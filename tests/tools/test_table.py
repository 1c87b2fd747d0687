"""The table of GPU programs: a line for each program, in the columns of the one that is kept."""

import csv
import io
from collections import Counter
from pathlib import Path

from tools.gpu_check.__main__ import COLUMNS, _kernels_lines, _steps_lines, _write
from tools.gpu_check.hlo import Sites
from tools.gpu_check.kernels import Case, Row
from tools.gpu_check.ptx import Kernel
from tools.gpu_check.step import StepRow

KEPT = Path(__file__).parents[2] / "results" / "gpu_programs.csv"


def row(case, gpu, registers, spilled_bytes):
    moved = Counter({16: case.least_bytes // 2})
    return Row(case, gpu, Kernel(registers, spilled_bytes, 1024, moved, moved, True))


def test_a_line_for_each_step_and_for_each_kernel_shape_and_type():
    wide, narrow = (Case("fake_quant", (16, 32, 32, 16), dtype) for dtype in ("float32", "bfloat16"))
    rows = [row(wide, "h100", 40, 0), row(wide, "a100", 38, 4), row(narrow, "h100", 64, 0)]
    step = StepRow("digits", "h100", 1, 19, Sites(19, 0, 0, 31_200_000), Sites(0, 9, 9, 69_300_000), *[(7, 8)] * 3)
    text = io.StringIO()
    _write([*_steps_lines([step]), *_kernels_lines(rows)], text)
    first, second, third = csv.DictReader(io.StringIO(text.getvalue()))
    assert (first["program"], first["mb_at_activations"]) == ("joint step of digits, 1 h100", "31.2")
    assert (second["shape"], second["registers_h100"], second["registers_a100"]) == ("16x32x32x16", "40", "38")
    assert (third["dtype"], third["registers_h100"], third["registers_a100"]) == ("bfloat16", "64", "")
    assert second["worst_spilled_bytes"] == third["worst_spilled_bytes"] == "4"
    assert second["worst_moved_over_least"] == "1.000"


def test_the_table_that_is_kept_has_these_columns():
    with KEPT.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
