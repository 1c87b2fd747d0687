"""``python -m tools.gpu_check [--all] [--csv FILE]``: compiles the GPU programs where there is no GPU."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import jax
from tqdm.auto import tqdm

from tools.gpu_check.kernels import Row, cases, compiled_row, faults_on_mosaic, on_mosaic
from tools.gpu_check.step import StepRow, step_row
from tools.gpu_check.targets import GPUS

# Some of every kind: one tile and several, with a loop, narrow and wide.
_SOME = ((16, 32, 32, 16), (16, 7, 7, 512), (16, 56, 56, 144), (16, 112, 112, 64), (3, 3, 512, 512), (3, 3, 1, 960))
_STEPS = (("paper/cifar10_w3a3", 1), ("paper/imagenet_resnet18_w3a3", 1), ("paper/cifar10_w3a3", 8))
_BYTES_A_MICROSECOND = 3e6
COLUMNS = (
    *("program", "shape", "dtype", "block_channels", "threads", "launches", *(f"registers_{gpu}" for gpu in GPUS)),
    *("worst_spilled_bytes", "worst_shared_kb", "worst_moved_16_bytes_at_a_time", "worst_moved_over_least"),
    *("us_at_3_tb_s", "activations", "by_the_kernel", "launches_xla", "mb_at_activations", "mb_at_activations_xla"),
    *("mb_moved", "mb_moved_xla", "temporary_mb", "temporary_mb_xla"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, inspects, and writes a table. Returns the exit status: 0, or 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shape, type and step, not some (half an hour)")
    parser.add_argument("--csv", type=Path, help="where the table is written; by default it is printed")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the compiler's plugin is no device
    jax.config.update("jax_enable_compilation_cache", False)  # it keeps no PTX

    chosen = [case for case in cases() if options.all or (case.shape in _SOME and case.dtype != "float16")]
    pairs = [(case, gpu) for case in chosen for gpu in (GPUS if options.all else GPUS[:1])]
    rows = [compiled_row(case, gpu) for case, gpu in tqdm(pairs, desc="kernels")]
    successors = {case: faults_on_mosaic(case, GPUS[0]) for case in tqdm(on_mosaic(chosen), desc="on Mosaic GPU")}
    named = [(name, GPUS[0], count) for name, count in (_STEPS if options.all else _STEPS[:1])]
    steps = [step_row(*step) for step in tqdm(named, desc="steps")]

    lines = [*_steps_lines(steps), *_kernels_lines(rows)]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            _write(lines, file)
    else:
        _write(lines, sys.stdout)
    faults = [f"{row.case} on {row.gpu}: {fault}" for row in rows for fault in row.faults]
    faults += [f"step of {row.config} on {row.count} {row.gpu}: {fault}" for row in steps for fault in row.faults]
    faults += [f"{case} on Mosaic GPU: {fault}" for case, found in successors.items() for fault in found]
    print(
        f"\n{len(rows)} kernels, {len(successors)} on Mosaic GPU, {len(steps)} steps compiled; {len(faults)} faults",
        *faults,
        sep="\n",
    )
    return 1 if faults else 0


def _steps_lines(rows: Iterable[StepRow]) -> Iterator[dict[str, object]]:
    """A line for each joint step."""
    for row in rows:
        yield {
            "program": f"joint step of {row.config}, {row.count} {row.gpu}",
            "activations": row.quantized,
            "by_the_kernel": row.kernels.kernels,
            "launches": row.launches[0],
            "launches_xla": row.launches[1],
            "mb_at_activations": f"{row.kernels.moved_bytes / 1e6:.1f}",
            "mb_at_activations_xla": f"{row.xla.moved_bytes / 1e6:.1f}",
            "mb_moved": f"{row.moved_bytes[0] / 1e6:.0f}",
            "mb_moved_xla": f"{row.moved_bytes[1] / 1e6:.0f}",
            "temporary_mb": f"{row.temporary_bytes[0] / 1e6:.2f}",
            "temporary_mb_xla": f"{row.temporary_bytes[1] / 1e6:.2f}",
        }


def _kernels_lines(rows: Iterable[Row]) -> Iterator[dict[str, object]]:
    """A line for each kernel, shape and type; what is called the worst is that of all types and GPUs."""
    grouped: dict[tuple[str, tuple[int, ...]], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.case.name, row.case.shape].append(row)
    for (name, shape), group in grouped.items():
        for case in dict.fromkeys(row.case for row in group):
            yield {
                "program": name,
                "shape": "x".join(map(str, shape)),
                "dtype": case.dtype,
                "block_channels": case.tiling.columns,
                "threads": case.tiling.threads,
                "launches": 2 if case.tiling.rows else 1,
                **{f"registers_{row.gpu}": row.kernel.registers for row in group if row.case == case},
                "worst_spilled_bytes": max(row.kernel.spilled_bytes for row in group),
                "worst_shared_kb": f"{max(row.kernel.shared_bytes for row in group) / 1024:.1f}",
                "worst_moved_16_bytes_at_a_time": f"{min(row.wide for row in group):.2f}",
                "worst_moved_over_least": f"{max(row.ratio for row in group):.3f}",
                "us_at_3_tb_s": f"{case.least_bytes / _BYTES_A_MICROSECOND:.1f}",
            }


def _write(lines: Iterable[dict[str, object]], file: TextIO) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
