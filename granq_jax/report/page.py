"""Reports as self-contained HTML: nothing is loaded from elsewhere, and no script runs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from granq_jax.config import default_config, flat, make_dataset
from granq_jax.data.datasets import DATASETS
from granq_jax.quant import Observation
from granq_jax.report import charts
from granq_jax.report.reading import RunRecord
from granq_jax.runs.metrics import LOSSES

ACCURACIES = (
    ("Teacher, full precision", "teacher_top1", "teacher_top5"),
    ("Quantized, before training", "student_top1_before", "student_top5_before"),
    ("Student, after the last step", "student_top1", "student_top5"),
)
_LOSS_TITLES = {
    "loss_g": "Generator loss",
    "loss_s": "Student loss",
    "hinge": "Balance hinge",
    "onehot": "One-hot term",
    "bns": "Batch-norm statistics",
}
_RANGES = {
    "out_channel": "output channel",
    "kernel": "input and output",
    "tensor": "tensor",
    "sample_channel": "sample and channel",
    "sample": "sample",
    "channel": "channel",
}
_UNKNOWN, _TIMES = "\u2013", " \u00d7 "
_LARGEST_IMAGE = 96
_MOST_BARS = 32


def run_page(run: RunRecord) -> str:
    """The report of one run, as HTML."""
    quant = run.config.quant
    curves = [accuracy_chart([("student", run)])] if _evaluations(run) else []
    return _template("run.html").render(
        title=title_of(run.config),
        run=run,
        status=_status(run),
        accuracies=_accuracies(run),
        tiles=_tiles(run),
        charts=[*curves, *loss_charts([("", run)])],
        classes=DATASETS[run.config.dataset].classes,
        images=[
            (int(label), strip(run, row))
            for label, row in zip(run.inspection.classes, run.inspection.images, strict=True)
        ],
        images_observed=int(np.prod(run.inspection.images.shape[:2])),
        weights=_rows(run.inspection.observations, "weight"),
        activations=_rows(run.inspection.observations, "activation"),
        levels=_levels(run.inspection.observations),
        quant=quant,
        settings=_settings(run.config),
    )


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Several runs side by side, as HTML."""
    named = list(zip(_names(runs), runs, strict=True))
    of_runs = [dict(flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for settings in of_runs for key in settings))
    values = {key: [str(settings.get(key, _UNKNOWN)) for settings in of_runs] for key in keys}
    measured = [(name, run) for name, run in named if _evaluations(run)]
    return _template("comparison.html").render(
        title=f"{len(runs)} runs side by side",
        runs=named,
        tiles=[_tiles(run) for run in runs],
        accuracies=[_accuracies(run) for run in runs],
        statuses=[_status(run) for run in runs],
        differing={key: row for key, row in values.items() if len(set(row)) > 1},
        equal=sum(len(set(row)) == 1 for row in values.values()),
        charts=[*([accuracy_chart(measured)] if measured else []), *loss_charts(named)],
        strips=[(name, strip(run, run.inspection.images[:, 0])) for name, run in named],
        errors={kind: _errors(runs, kind) for kind in ("weight", "activation")},
        levels=[(name, _levels(run.inspection.observations)) for name, run in named],
    )


def title_of(config: ConfigDict) -> str:
    """What was done, in a line.

    Examples:
      >>> title_of(default_config())
      'resnet20_cifar10 · W3A3'
    """
    return f"{config.network} · W{config.quant.weight_bits}A{config.quant.act_bits}"


def accuracy_chart(runs: Sequence[tuple[str, RunRecord]]) -> charts.Chart:
    """Top-1 of students over steps; of a single run with its teacher's as a line."""
    curves = []
    for name, run in runs:
        before = run.result.get("student_top1_before")
        start = [] if before is None else [(0.0, float(before))]
        curves.append((name, start + _evaluations(run)))
    teacher = runs[0][1].result.get("teacher_top1") if len(runs) == 1 else None
    return charts.line_chart(
        "Top-1 on test images, %",
        curves,
        levels=[] if teacher is None else [("teacher", float(teacher))],
        shade_until=_warmup(runs),
    )


def loss_charts(runs: Sequence[tuple[str, RunRecord]]) -> list[charts.Chart]:
    """A chart for each term of the losses."""
    return [
        charts.line_chart(
            f"{_LOSS_TITLES[loss]} ({loss})",
            [(name, _losses(run, loss)) for name, run in runs],
            shade_until=_warmup(runs),
        )
        for loss in LOSSES
    ]


def strip(run: RunRecord, images: np.ndarray) -> str:
    """Generated images (N, H, W, C) of a run in a row, as a ``data:`` address."""
    return data_uri(image_grid(make_dataset(run.config).pixels(images[None])))


def image_grid(pixels: np.ndarray) -> np.ndarray:
    """Images (rows, columns, H, W, C) as one (H', W', C), a pixel apart, large ones made smaller.

    Examples:
      >>> image_grid(np.zeros((2, 3, 8, 8, 1), np.uint8)).shape
      (17, 26, 1)
    """
    stride = -(-pixels.shape[2] // _LARGEST_IMAGE)
    size = pixels.shape[2] // stride
    rows, columns, channels = *pixels.shape[:2], pixels.shape[-1]
    cut = pixels[:, :, : size * stride, : size * stride].astype(np.float32)
    small = cut.reshape(rows, columns, size, stride, size, stride, channels).mean((3, 5)).round().astype(np.uint8)
    spaced = np.pad(small, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    joined = spaced.transpose(0, 2, 1, 3, 4).reshape(rows * (size + 1), columns * (size + 1), channels)
    return joined[:-1, :-1]


def data_uri(pixels: np.ndarray) -> str:
    """An image (H, W, C), uint8, as a PNG within a ``data:`` address."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _status(run: RunRecord) -> str:
    total = run.config.epochs * run.config.steps_per_epoch
    return f"{total} steps, finished" if run.result else f"unfinished: step {run.step} of {total}"


def _accuracies(run: RunRecord) -> list[tuple[str, float | None, float | None]]:
    """(what, top-1, top-5) of teacher and student."""
    rows = [(what, run.result.get(top1), run.result.get(top5)) for what, top1, top5 in ACCURACIES]
    if not run.result and (evaluations := _evaluations(run)):
        step, newest = evaluations[-1]
        rows[-1] = (f"Student, after step {step}", newest, None)
    return rows


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """(what, figure, remark): what a reader looks for first."""
    tiles = [
        (label, "not measured" if top1 is None else f"{top1:.2f} %", "top-1") for label, top1, _ in _accuracies(run)
    ]
    storage = run.inspection.storage
    small = sum(value for key, value in storage.items() if key != "teacher")
    tiles.append(("Storage", size(small), f"codes packed; {size(storage['teacher'])} in float32"))
    of_activations = run.inspection.activation_storage.effective_bits
    for what, bits in (("a weight", run.result.get("effective_weight_bits")), ("an activation", of_activations)):
        effective = _UNKNOWN if bits is None else f"{bits:.2f}"
        tiles.append((f"Effective bits {what}", effective, "scales and zero points counted"))
    seconds = run.result.get("seconds_per_step")
    tiles.append(("Seconds a step", _UNKNOWN if seconds is None else f"{seconds:.3f}", "median, compiling left out"))
    return tiles


def size(count: int) -> str:
    """Bytes for people.

    Examples:
      >>> size(999), size(123456), size(44_700_000)
      ('999 B', '123 kB', '44.7 MB')
    """
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _rows(observations: Iterable[Observation], kind: str) -> list[dict[str, Any]]:
    rows = []
    for observation in observations:
        site = observation.site
        if site.kind == kind:
            counts = [] if observation.code_counts is None else np.asarray(observation.code_counts).tolist()
            rows.append(
                {
                    "path": site.path,
                    "shape": _TIMES.join(map(str, site.shape if kind == "weight" else site.shape[1:])),
                    "bits": site.bits,
                    "granularity": None if site.granularity is None else _RANGES[site.granularity],
                    "effective_bits": f"{site.effective_bits:.2f}",
                    "quantization_error": f"{100 * float(observation.quantization_error):.2f}",
                    "teacher_error": f"{100 * float(observation.teacher_error):.2f}",
                    "shares": charts.shares(charts.neighbours(counts, _MOST_BARS)),
                    "used": sum(count > 0 for count in counts),
                    "levels": len(counts),
                }
            )
    return rows


def _levels(observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """The codes of all weights together, and those of all activations, for each bit width."""
    totals: dict[tuple[str, int], np.ndarray] = {}
    for observation in observations:
        if observation.code_counts is not None and observation.site.bits is not None:
            key = observation.site.kind, observation.site.bits
            totals[key] = totals.get(key, 0) + np.asarray(observation.code_counts, np.int64)
    return [
        {
            "title": f"{'Weights' if kind == 'weight' else 'Activations'}, {bits} bits",
            "shares": charts.shares(charts.neighbours(counts.tolist(), _MOST_BARS)),
            "lowest": -(2 ** (bits - 1)),
            "together": max(1, 2**bits // _MOST_BARS),
        }
        for (kind, bits), counts in totals.items()
    ]


def _errors(runs: Sequence[RunRecord], kind: str) -> dict[str, list[str]]:
    """Quantization errors in percent by path, one of each run."""
    by_run = []
    for run in runs:
        sites = [o for o in run.inspection.observations if o.site.kind == kind]
        by_run.append({o.site.path: f"{100 * float(o.quantization_error):.2f}" for o in sites})
    paths = dict.fromkeys(path for errors in by_run for path in errors)
    return {path: [errors.get(path, _UNKNOWN) for errors in by_run] for path in paths}


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Names of workdirs, or their paths where names are not enough."""
    names = [run.workdir.absolute().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.workdir) for run in runs]


def _settings(config: ConfigDict) -> list[tuple[str, str, bool]]:
    """(key, value, whether it is not the default)."""
    defaults = dict(flat(default_config()))
    return [(key, str(value), value != defaults[key]) for key, value in flat(config)]


def _warmup(runs: Sequence[tuple[str, RunRecord]]) -> float:
    warmups = {run.config.warmup_epochs * run.config.steps_per_epoch for _, run in runs}
    return float(warmups.pop()) if len(warmups) == 1 else 0.0


def _evaluations(run: RunRecord) -> list[charts.Point]:
    return [(step, line["student_top1"]) for step, line in _by_step(run.metrics, "student_top1").items()]


def _losses(run: RunRecord, loss: str) -> list[charts.Point]:
    """A loss by step; ``metrics.jsonl`` has ``null`` for one that was not finite."""
    lines = _by_step(run.metrics, loss)
    return [(step, math.nan if line[loss] is None else line[loss]) for step, line in lines.items()]


def _by_step(lines: Iterable[dict[str, Any]], field: str) -> dict[int, dict[str, Any]]:
    """Lines that have ``field``, by step; of two of the same step, the later one."""
    found = {line["step"]: line for line in lines if field in line}
    return {step: found[step] for step in sorted(found)}


def _template(name):
    import jinja2  # here: importing it takes 0.07 s of every start, and only the end of a run needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("granq_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
