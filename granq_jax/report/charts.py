"""Line charts and bars as the numbers an SVG needs; the templates draw them.

A page with a dozen small charts needs no plotting library, and shapes drawn by the page itself take
its colours, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 26
_MOST_POINTS = 400

Point = tuple[float, float]


class Tick(NamedTuple):
    """A labelled place on an axis, in the drawing's units."""

    at: float
    label: str


class Curve(NamedTuple):
    """A line or a set of dots, in the drawing's units."""

    name: str
    number: int
    path: str
    dots: list[Point]
    last: str


class Chart(NamedTuple):
    """A line chart, ready to be drawn."""

    title: str
    summary: str
    curves: list[Curve]
    levels: list[tuple[str, float]]
    shade: float | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    note: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    title: str,
    curves: Sequence[tuple[str, Sequence[Point]]],
    *,
    levels: Sequence[tuple[str, float]] = (),
    shade_until: float = 0.0,
) -> Chart:
    """Curves over one pair of linear axes.

    Args:
      title: what is drawn.
      curves: names and points (x, y), x increasing. Points that are not finite leave a gap; of many
        points the means of neighbours are drawn, and the chart says so.
      levels: names and heights of horizontal lines.
      shade_until: the part of the x axis that is set apart.

    Examples:
      >>> chart = line_chart("loss", [("a", [(0, 1.0), (10, 3.0)])])
      >>> [tick.label for tick in chart.y_ticks], chart.curves[0].path
      (['1.0', '1.5', '2.0', '2.5', '3.0'], 'M50 194L350 10')
    """
    thinned = [(name, _thin(points)) for name, points in curves]
    finite = [p for _, points in thinned for p in points if all(map(math.isfinite, p))]
    xs = [x for x, _ in finite] or [0.0, 1.0]
    ys = [y for _, y in finite] + [level for _, level in levels if math.isfinite(level)] or [0.0, 1.0]
    x_ticks, y_ticks = _ticks(min(0.0, *xs), max(xs), 5), _ticks(min(ys), max(ys), 5)
    x_low, x_high = min(0.0, *xs), max(*xs, 1e-9)
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def x_at(x):
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def y_at(y):
        return round(HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 1)

    drawn = []
    for number, (name, points) in enumerate(thinned):
        path, dots, gap = "", [], True
        for x, y in points:
            if not math.isfinite(y):
                gap = True
                continue
            path += f"{'M' if gap else 'L'}{x_at(x):g} {y_at(y):g}"
            dots.append((x_at(x), y_at(y)))
            gap = False
        last = next((f"{y:.4g}" for _, y in reversed(points) if math.isfinite(y)), "none")
        drawn.append(Curve(name, number, path, dots if len(dots) <= 30 else [], last))
    most = max((len(points) for _, points in curves), default=0)
    step = -(-most // _MOST_POINTS)
    return Chart(
        title,
        f"{title} over steps 0 to {max(xs):g}; last: " + ", ".join(f"{c.name} {c.last}".strip() for c in drawn),
        drawn,
        [(name, y_at(level)) for name, level in levels if math.isfinite(level)],
        x_at(min(shade_until, x_high)) if shade_until else None,
        [Tick(x_at(x), label) for x, label in zip(x_ticks, _labels(x_ticks), strict=True)],
        [Tick(y_at(y), label) for y, label in zip(y_ticks, _labels(y_ticks), strict=True)],
        f"each point the mean of {step} logged ones" if step > 1 else "",
    )


def _thin(points: Sequence[Point]) -> list[Point]:
    size = max(1, -(-len(points) // _MOST_POINTS))
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from about ``low`` to about ``high``, which lie within them but for the ends."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    places = range(first, math.floor(high / step + 1e-9) + 1)
    return [float(f"{place * step:.12g}") for place in places]


def _labels(ticks: Sequence[float]) -> list[str]:
    """What is written at ``ticks``: as many digits as tell them apart.

    Examples:
      >>> _labels([-921.0, -920.5]), _labels([0, 20000]), _labels([0.0, 5e-05])
      (['-921.0', '-920.5'], ['0', '20000'], ['0', '5e-05'])
    """
    step = ticks[1] - ticks[0] if len(ticks) > 1 else ticks[0] if ticks else 1.0
    exact = [f"{tick:g}" for tick in ticks]
    if max(map(abs, ticks), default=0.0) >= 1e5 or (step and abs(step) < 1e-4):
        return exact
    decimals = max(len(text.partition(".")[2]) for text in (f"{round(tick, 6):.6f}".rstrip("0") for tick in ticks))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def shares(counts: Sequence[int]) -> list[float]:
    """Percent of the whole that each count is.

    Examples:
      >>> shares([1, 3])
      [25.0, 75.0]
    """
    total = sum(counts)
    return [100.0 * count / total if total else 0.0 for count in counts]


def neighbours(counts: Sequence[int], most: int) -> list[int]:
    """Counts added up in groups of neighbours, so that there are at most ``most``.

    Examples:
      >>> neighbours([1, 2, 3, 4], 2)
      [3, 7]
    """
    size = max(1, -(-len(counts) // most))
    return [sum(counts[i : i + size]) for i in range(0, len(counts), size)]
