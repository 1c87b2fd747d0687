"""Of what the GPU campaign's files hold: the summary in docs/gpu.md, and what each part says at its end."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

KERNELS, COPY_AIM, LARGE = "kernels", 0.85, 1.0
BEGIN, END = "<!-- begin: python benchmarks/gpu_campaign.py --page -->", "<!-- end -->"
Row = dict[str, str]


def rows(out: Path, name: str) -> list[Row]:
    """Of a table, or of several, ``name.csv`` and ``name_*.csv``, where a campaign was made in more than one go."""
    found = []
    for path in sorted([*out.glob(f"{name}.csv"), *out.glob(f"{name}_*.csv")]):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def page(out: Path) -> str:
    """A screen of all parts; the rest is in the files themselves."""
    sections = {
        "Correctness": _correctness_summary(out),
        "Bandwidth of the kernels": _bandwidth_summary(out),
        "The joint step": _steps_summary(out),
    }
    text = {title: "\n".join(lines) for title, lines in sections.items()}
    return "\n\n".join(f"### {title}\n\n{body or 'Not measured.'}" for title, body in text.items())


def put_into(text: str, summary: str) -> str:
    """The text of a page with the summary between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{summary}\n\n{END}{rest.split(END)[1]}"


def of_part(part: str, out: Path) -> str:
    """What a part's tables say, as the page does."""
    sections = {
        "a": [_machine],
        "b": [_correctness],
        "c": [_bandwidth],
        "d": [_steps],
        "e": [lambda out: _runs(out, "runs")],
        "f": [lambda out: _runs(out, "imagenet")],
    }
    return "\n".join(line for section in sections[part] for line in section(out))


def _table(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        columns = list(columns)
        yield f"| {' | '.join(columns)} |"
        yield "|" + " --- |" * len(columns)
        yield from (f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |" for line in lines)


def _number(text: str, digits: int = 3) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _machine(out):
    lines = [
        (r["what"], f"{_number(r['value'])} {r['unit']}" if r["unit"] else r["value"]) for r in rows(out, "machine")
    ]
    yield from _table(("what", "value"), [line for line in lines if line[1]])


def _correctness_summary(out):
    found = rows(out, "correctness")
    if not found:
        return
    yield f"{len(found)} checks, of which {sum(row['passed'] != 'True' for row in found)} failed."
    kinds = {
        "kernels, values against the formula in float64": lambda row: row["other_codes"] and "W3A3" not in row["what"],
        "gradients against float64": lambda row: row["what"].startswith("gradient"),
        "golden figures in float64": lambda row: row["what"].startswith("golden"),
        "students, code by code": lambda row: "W3A3" in row["what"],
    }
    yield ""
    yield from _table(
        ("kind", "checks", "passed", "elements", "other codes", "greatest difference"),
        (
            (
                kind,
                str(len(some)),
                str(sum(row["passed"] == "True" for row in some)),
                f"{sum(int(row['elements'] or 0) for row in some):,}",
                f"{sum(float(row['other_codes'] or 0) for row in some):.0f}",
                _number(str(max((float(row["worst_in_steps"] or 0) for row in some), default=0.0))),
            )
            for kind, holds in kinds.items()
            if (some := [row for row in found if holds(row)])
        ),
    )


def _correctness(out):
    found = rows(out, "correctness")
    yield from _correctness_summary(out)
    yield ""
    yield from (
        f"- {r['what']}: {int(float(r['other_codes']))} of {r['elements']}" for r in found if "W3A3," in r["what"]
    )
    for row in [row for row in found if row["passed"] != "True"][:30]:
        figures = (
            f"{row['other_codes']} other codes, {row['worst_in_steps']} steps, {row['not_finite_differs']} not finite"
        )
        yield f"- failed: {row['what']} {row['shape']} {row['dtype']}: {row['error'][:300] or figures}"


def _timed(out):
    """Of the kernels' rows those whose clock is that of the copy beside them."""
    return [row for row in rows(out, "bandwidth") if not row["error"] and row["clock"] == row["copy_clock"]]


def _bandwidth_summary(out):
    measured = _timed(out)

    def summary():
        for dtype in dict.fromkeys(row["dtype"] for row in measured):
            for low, high in ((0.0, LARGE), (LARGE, 10.0), (10.0, math.inf)):
                some = [row for row in measured if row["dtype"] == dtype and low <= float(row["megabytes"]) < high]
                if not some:
                    continue
                shares, gains = ([float(row[key]) for row in some] for key in ("of_copy", "xla_over_kernel"))
                size = f"{low:g} to {high:g} MB" if high < math.inf else f"{low:g} MB and more"
                share, gain = statistics.median(shares), statistics.median(gains)
                yield dtype, size, str(len(some)), f"{share:.0%}", f"{gain:.2f}", f"{min(gains):.2f}"

    yield from _table(("dtype", "maps", "cases", "of the copy", "XLA / kernel", "at least"), summary())


def _bandwidth(out):
    yield from _bandwidth_summary(out)
    short = [row for row in _timed(out) if float(row["megabytes"]) >= LARGE and float(row["of_copy"]) < COPY_AIM]
    if short:
        yield ""
        yield f"Maps of {LARGE:g} MB and more below {COPY_AIM:.0%} of the copy, the slowest first:"
        yield ""
        yield from _table(
            ("kernel", "shape", "dtype", "block", "us", "of the copy", "XLA / kernel"),
            (
                (
                    *(row["kernel"], row["shape"], row["dtype"], row["block"], _number(row["us"])),
                    *(f"{float(row['of_copy']):.0%}", _number(row["xla_over_kernel"])),
                )
                for row in sorted(short, key=lambda row: float(row["of_copy"]))[:20]
            ),
        )
    yield from (
        f"- failed: {r['kernel']} {r['shape']} {r['dtype']}: {r['error'][:200]}"
        for r in rows(out, "bandwidth")
        if r["error"]
    )


def rates(out: Path) -> dict[str, float]:
    """Bandwidth in GB/s and matrix products in TFLOP/s, the best of what was measured, by what they are."""
    found: dict[str, float] = {}
    for row in rows(out, "machine"):
        what = row["what"].split(" of ")[0]
        if row["unit"] and row["value"]:
            found[what] = max(found.get(what, 0.0), float(row["value"]))
    return found


def floor_ms(row: Row, rates: dict[str, float]) -> float | None:
    """What a step takes at least: its bytes at the copy's rate, or its products at theirs, whichever is longer."""
    precision = "highest" if row["precision"] == "float32" else "tensorfloat32"
    copy, product = rates.get("copy"), rates.get(f"matrix product, float32 at {precision}")
    if not (copy and product and row["moved_gb"] and row["gflop"]):
        return None
    return max(1e3 * float(row["moved_gb"]) / copy, float(row["gflop"]) / product)


def _steps(out):
    known = rates(out)

    def line(row):
        described = (row["network"], row["batch"], row["precision"], row["side"])
        if row["error"] and not row["ms"]:
            return (*described, f"failed: {row['error'][:120]}", *[""] * 7)
        least = floor_ms(row, known)
        share = "" if least is None else f"{least / float(row['ms']):.0%}"
        figures = (_number(row[key]) for key in ("ms", "over_kernels", "device_ms"))
        launches = row["launches"] and f"{float(row['launches']):.0f}"
        memory = (_number(row[key]) for key in ("peak_gb", "temporary_gb"))
        return (*described, *figures, launches, *memory, "" if least is None else _number(str(least)), share)

    columns = ("network", "batch", "precision", "side", "ms a step", "over the kernels'", "device ms", "launches")
    columns = (*columns, "peak GB", "temporary GB", "floor ms", "share of the floor")
    yield from _table(columns, map(line, rows(out, "steps")))


def _steps_summary(out):
    def line(row):
        launches = row["launches"] and f"{float(row['launches']):.0f}"
        described = (row["network"], row["batch"], row["precision"], row["side"])
        return (*described, _number(row["ms"]), _number(row["device_ms"]), launches, _number(row["peak_gb"]))

    columns = ("network", "batch", "precision", "side", "ms a step", "device ms", "launches", "peak GB")
    yield from _table(columns, (line(row) for row in rows(out, "steps") if row["ms"]))


def _runs(out, name):
    def line(row):
        if row["error"]:
            return (row["config"], row["settings"], f"failed: {row['error'][:150]}", *[""] * 8)
        top1 = (_number(row[key], 4) for key in ("teacher_top1", "student_top1_before", "student_top1", "best_top1"))
        steps = f"{row['steps']} of {row['of_steps']}, {row['ended']}"
        minutes = f"{float(row['wall_s']) / 60:.1f}" if row["wall_s"] else ""  # runs that shared the GPU have none
        times = (minutes, _number(row["ms_a_step"]))
        return (row["config"], row["settings"], steps, *times, *top1, row["top1_by_epoch"], _number(row["gpu_gb"]))

    columns = (
        *("config", "settings", "steps", "minutes", "ms a step", "teacher", "before", "after", "best"),
        *("top-1 after epoch", "GPU GB"),
    )
    yield from _table(columns, map(line, rows(out, name)))
