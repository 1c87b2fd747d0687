import math
import re

import pytest

from granq_jax.report.charts import line_chart


def test_heights_are_proportional_to_values():
    chart = line_chart("a", [("", [(0, 2.0), (5, 4.0), (10, 3.0)])])
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", chart.curves[0].path)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, x2) == (chart.left, chart.right)
    assert x1 == (x0 + x2) / 2
    assert (y0, y1) == (chart.bottom, chart.top)  # down is up
    assert y2 == pytest.approx((y0 + y1) / 2)
    ticks = {float(tick.label): tick.at for tick in chart.y_ticks}
    assert ticks[2.0] == chart.bottom
    assert ticks[4.0] == chart.top


def test_what_is_not_finite_leaves_a_gap():
    chart = line_chart("a", [("", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0), (5, math.inf)])])
    assert chart.curves[0].path.count("M") == 2
    assert "nan" not in chart.curves[0].path
    assert chart.curves[0].last == "2"


@pytest.mark.parametrize("points", [[], [(0, 3.0)], [(0, 1.0), (9, 1.0)], [(4, math.nan)], [(0, -1e-9), (1, 1e12)]])
def test_any_data_can_be_drawn(points):
    chart = line_chart("a", [("", points)])
    numbers = re.findall(r"-?[\d.]+", chart.curves[0].path)
    assert all(0 <= float(number) <= chart.width for number in numbers)
    assert chart.y_ticks


def test_many_points_are_drawn_as_means_which_is_said():
    points = [(x, float(x % 2)) for x in range(4000)]
    chart = line_chart("a", [("", points)])
    heights = {pair.split(" ")[1] for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", chart.curves[0].path)}
    assert len(heights) == 1  # each a mean of as many zeros as ones
    assert chart.note == "each point the mean of 10 logged ones"
    assert line_chart("a", [("", points[:400])]).note == ""
