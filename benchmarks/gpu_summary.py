"""What a part of the GPU campaign found, in a few lines, from the tables it wrote."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path


def rows(path: Path) -> list[dict[str, str]]:
    """Of a table, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_part(part: str, out: Path) -> str:
    """A summary of what the part wrote."""
    return "\n".join(
        f"  {line}" for line in {"a": _machine, "b": _correctness, "c": _bandwidth, "d": _steps}[part](out)
    )


def _machine(out):
    for row in rows(out / "machine.csv"):
        yield f"{row['what']}: {row['error'] or row['value']} {row['unit']} {row['clock']}".rstrip()


def _correctness(out):
    found = rows(out / "correctness.csv")
    failed = [row for row in found if row["passed"] != "True"]
    yield f"{len(found)} checks, {len(failed)} failed"
    for row in failed[:20]:
        yield f"failed: {row['what']} {row['shape']} {row['dtype']} {row['other_codes']} {row['worst_in_steps']} " + (
            f"{row['not_finite_differs']} {row['error'][:200]}"
        )
    yield from (f"{row['what']}: {row['other_codes']} of {row['elements']}" for row in found if "W3A3," in row["what"])


def _bandwidth(out):
    found = rows(out / "bandwidth.csv")
    measured = [row for row in found if not row["error"]]
    yield f"{len(found)} kernels at their shapes, {len(found) - len(measured)} failed"
    for row in [row for row in found if row["error"]][:5]:
        yield f"failed: {row['kernel']} {row['shape']} {row['dtype']}: {row['error'][:200]}"
    for low, high in ((0, 1), (1, 10), (10, 1e9)):
        some = [row for row in measured if low <= float(row["megabytes"]) < high]
        if some:
            shares, gains = ([float(row[key]) for row in some] for key in ("of_copy", "xla_over_kernel"))
            yield (
                f"maps of {low} MB and more: {len(some)}, of the copy's rate {min(shares):.0%} to {max(shares):.0%}, "
                f"median {statistics.median(shares):.0%}; XLA's time over the kernel's {min(gains):.2f} to "
                f"{max(gains):.2f}, median {statistics.median(gains):.2f}"
            )


def _steps(out):
    for row in rows(out / "steps.csv"):
        if row["error"]:
            yield f"{row['network']} batch {row['batch']}, {row['side']}: {row['error'][:300]}"
        else:
            yield (
                f"{row['network']} batch {row['batch']}, {row['side']}: {row['ms']} ms a step, device "
                f"{row['device_ms']} ms, {row['launches']} launches, {row['peak_gb']} GB, "
                f"{row['over_kernels']} times the kernels' time"
            )
