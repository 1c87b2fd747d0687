"""``python -m tools.gpu_check [--all] [--markdown FILE]``: compiles the GPU programs where there is no GPU."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from tqdm.auto import tqdm

from tools.gpu_check.kernels import Case, Row, cases, compiled_row, faults_on_mosaic, on_mosaic
from tools.gpu_check.step import StepRow, step_row
from tools.gpu_check.targets import GPUS

# Some of every kind: one tile and several, with a loop, narrow and wide.
_SOME = ((16, 32, 32, 16), (16, 7, 7, 512), (16, 56, 56, 144), (16, 112, 112, 64), (3, 3, 512, 512), (3, 3, 1, 960))
_STEPS = (("paper/cifar10_w3a3", 1), ("paper/imagenet_resnet18_w3a3", 1), ("paper/cifar10_w3a3", 8))
_BYTES_A_MICROSECOND = 3e6
_BEGIN, _END = "<!-- begin: python -m tools.gpu_check -->", "<!-- end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, inspects, and prints a table. Returns the exit status: 0, or 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shape, type and step, not some (half an hour)")
    parser.add_argument("--markdown", type=Path, help="a file between whose marks the tables are written as well")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the compiler's plugin is no device
    jax.config.update("jax_enable_compilation_cache", False)  # it keeps no PTX

    chosen = [case for case in cases() if options.all or (case.shape in _SOME and case.dtype != "float16")]
    pairs = [(case, gpu) for case in chosen for gpu in (GPUS if options.all else GPUS[:1])]
    rows = [compiled_row(case, gpu) for case, gpu in tqdm(pairs, desc="kernels")]
    successors = {case: faults_on_mosaic(case, GPUS[0]) for case in tqdm(on_mosaic(chosen), desc="on Mosaic GPU")}
    named = [(name, GPUS[0], count) for name, count in (_STEPS if options.all else _STEPS[:1])]
    steps = [step_row(*step) for step in tqdm(named, desc="steps")]

    tables = "\n\n".join([_steps_table(steps), _kernels_table(rows)])
    print(tables)
    if options.markdown:
        before, rest = options.markdown.read_text().split(_BEGIN)
        options.markdown.write_text(f"{before}{_BEGIN}\n\n{tables}\n\n{_END}{rest.split(_END)[1]}")
    faults = [f"{row.case} on {row.gpu}: {fault}" for row in rows for fault in row.faults]
    faults += [f"step of {row.config} on {row.count} {row.gpu}: {fault}" for row in steps for fault in row.faults]
    faults += [f"{case} on Mosaic GPU: {fault}" for case, found in successors.items() for fault in found]
    print(
        f"\n{len(rows)} kernels, {len(successors)} on Mosaic GPU, {len(steps)} steps compiled; {len(faults)} faults",
        *faults,
        sep="\n",
    )
    return 1 if faults else 0


def _steps_table(steps: Iterable[StepRow]) -> str:
    header = (
        "joint step, GPUs",
        "activations quantized",
        "by the kernel",
        "MB moved there: kernel, XLA",
        "ratio",
        "launches: kernel, XLA",
        "MB moved by the whole step: kernel, XLA",
        "temporary MB: kernel, XLA",
    )
    rows = [
        (
            f"{row.config}, {row.count} {row.gpu}",
            row.quantized,
            row.kernels.kernels,
            f"{row.kernels.moved_bytes / 1e6:.1f}, {row.xla.moved_bytes / 1e6:.1f}",
            f"{row.ratio:.2f}",
            ", ".join(map(str, row.launches)),
            ", ".join(f"{moved / 1e6:.0f}" for moved in row.moved_bytes),
            ", ".join(f"{held / 1e6:.2f}" for held in row.temporary_bytes),
        )
        for row in steps
    ]
    return _table(header, rows)


def _kernels_table(rows: Iterable[Row]) -> str:
    """A line for each kernel and shape, with its types side by side and the worst over GPUs."""
    header = (
        "kernel",
        "shape",
        "types",
        "block: channels x threads",
        "launches",
        *(f"registers {gpu}" for gpu in GPUS),
        "spills",
        "shared KB",
        "moved 16 bytes at a time",
        "moved / least",
        "µs at 3 TB/s",
    )
    grouped: dict[tuple[str, tuple[int, ...]], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.case.name, row.case.shape].append(row)

    lines = []
    for (name, shape), group in grouped.items():
        by_dtype = list({row.case.dtype: row.case for row in group}.values())

        def each(show: Callable[[Case], str], by_dtype: Sequence[Case] = by_dtype) -> str:
            return ", ".join(map(show, by_dtype))

        def registers(gpu: str, group: Sequence[Row] = group) -> str:
            return ", ".join(str(row.kernel.registers) for row in group if row.gpu == gpu)

        lines.append(
            (
                name,
                " x ".join(map(str, shape)),
                each(lambda case: {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[case.dtype]),
                each(lambda case: f"{case.tiling.columns} x {case.tiling.threads}"),
                each(lambda case: "2" if case.tiling.rows else "1"),
                *(registers(gpu) for gpu in GPUS),
                max(row.kernel.spilled_bytes for row in group),
                f"{max(row.kernel.shared_bytes for row in group) / 1024:.1f}",
                f"{100 * min(row.wide for row in group):.0f} %",
                f"{max(row.ratio for row in group):.3f}",
                each(lambda case: f"{case.least_bytes / _BYTES_A_MICROSECOND:.1f}"),
            )
        )
    return _table(header, lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
