"""Charts against numpy, and against what their own coordinates say."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MARKED,
    MOST_BINS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    bins,
    chart,
    ticks,
)

NUMBERS = st.floats(-1e6, 1e6)


def svg(*lines: Line) -> ElementTree.Element:
    found = chart(lines, 'what <is> "drawn"')
    assert found is not None
    return ElementTree.fromstring(found)


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


@given(st.lists(NUMBERS, max_size=60), st.integers(1, 20))
def test_bins_are_numpy_s(values: list[float], most: int) -> None:
    """Equal counts to within one, in order, nothing lost."""
    found = bins([(float(i), y) for i, y in enumerate(values)], most)
    assert len(found) == min(most, len(values))
    assert sum(one.count for one in found) == len(values)
    start = 0
    for one in found:
        part = np.array(values[start : start + one.count])
        assert abs(one.count - len(values) / len(found)) <= 1
        assert (one.low, one.high) == (part.min(), part.max())
        assert one.mean == pytest.approx(part.mean(), abs=1e-6)
        assert one.x == pytest.approx(start + (one.count - 1) / 2)
        start += one.count


def test_what_is_no_number_is_no_point() -> None:
    found = bins([(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, -1e200), (4.0, 3.0)])
    assert [(one.x, one.mean) for one in found] == [(0.0, 1.0), (4.0, 3.0)]
    assert chart([Line("a", [(0.0, math.nan)])], "nothing") is None
    assert chart([Line("a", [])], "nothing") is None


@given(NUMBERS, st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_neither_few_nor_many(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    assert about / 2 - 1 <= len(found) <= 2 * about + 1
    steps = np.diff(found)
    if len(found) > 2 and abs(low) < 1e6 * span:
        assert steps == pytest.approx(steps[0], rel=1e-6)
        assert float(f"{steps[0]:.1e}"[0]) in (1, 2, 5)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= value <= low + span + slack for value in found)


def test_iterations_are_whole() -> None:
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]
    assert ticks(0, 1, 5, whole=True) == [0, 1]
    assert ticks(7, 7) == [7]


@pytest.mark.parametrize("count", [1, 2, 3, MARKED, 150, 3000])
def test_few_points_are_marked_and_many_have_a_band(count: int) -> None:
    """The drawn place of each point follows from the value, by the places of two others."""
    rng = np.random.default_rng(count)
    values = rng.normal(5.0, 2.0, count)
    root = svg(Line("a & b", [(float(i), float(y)) for i, y in enumerate(values)], 3))
    dots = root.findall("circle[@class='dot c3']")
    lines = root.findall("polyline[@class='line c3']")
    bands = root.findall("polygon[@class='band c3']")
    assert len(dots) == (count if count <= MARKED else 0)
    assert len(lines) == (1 if count > 1 else 0)
    assert len(bands) == (1 if count > MOST_BINS else 0)
    drawn = points(lines[0]) if lines else []
    if 2 < count <= MOST_BINS:
        slope, offset = np.polyfit(values, [y for _, y in drawn], 1)
        assert slope < 0  # upwards is less in SVG
        assert [y for _, y in drawn] == pytest.approx(slope * values + offset, abs=0.2)
        assert (drawn[0][0], drawn[-1][0]) == (LEFT, WIDTH - RIGHT)
    if bands:
        assert len(drawn) == MOST_BINS
        edge = points(bands[0])
        highs, lows = edge[:MOST_BINS], edge[MOST_BINS:][::-1]
        assert all(
            high[1] <= y <= low[1] and x == high[0] == low[0]
            for (x, y), high, low in zip(drawn, highs, lows, strict=True)
        )
    for x, y in [*drawn, *(points(bands[0]) if bands else [])]:
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM
    if dots:
        title = dots[0].find("title")
        assert title is not None
        assert re.fullmatch(r"a & b: [-0-9.]+ at 0", title.text or "")


def test_a_value_that_never_changes_is_in_the_middle() -> None:
    for value in (0.0, 256.0, -3e-9):
        (line,) = svg(Line("a", [(0.0, value), (5.0, value)])).findall("polyline")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        assert [y for _, y in points(line)] == pytest.approx([middle] * 2, abs=0.1)


def test_intervals_are_inside_the_chart() -> None:
    root = svg(Line("a", [(0.0, 1.0), (1.0, 2.0)], 0, [3.0, 0.5]))
    ends = [(float(e.attrib["y1"]), float(e.attrib["y2"])) for e in root.findall("line[@class='line c0']")]
    assert len(ends) == 2
    assert ends[0][0] - ends[0][1] == pytest.approx(6 * (ends[1][0] - ends[1][1]), rel=0.02)
    assert all(TOP <= y <= HEIGHT - BOTTOM for pair in ends for y in pair)


def test_charts_say_what_they_show() -> None:
    root = svg(Line("a", [(0.0, 1.0)]), Line("b", [(0.0, 2.0)], 1))
    assert root.attrib["aria-label"] == 'what <is> "drawn"'
    assert len(root.findall("circle")) == 2


def test_intervals_of_many_points_are_a_band() -> None:
    """Of few points they are strokes; the extremes of neighbours would say something else."""
    count = 2 * MOST_BINS
    line = Line("held out", [(float(i), 0.5) for i in range(count)], spread=[0.25] * count)
    drawn = svg(line)
    (band,) = drawn.iter("polygon")
    (path,) = drawn.iter("polyline")
    places = [y for _, y in points(band)]
    assert len(places) == 2 * MOST_BINS
    middle = points(path)[0][1]
    assert set(places) == {min(places), max(places)}
    assert middle - min(places) == pytest.approx(max(places) - middle, abs=0.11)
    few = svg(Line("held out", [(0.0, 0.5), (1.0, 0.5)], spread=[0.25, 0.25]))
    assert not list(few.iter("polygon"))
    stroke = next(one for one in few.iter("line") if one.attrib["class"] == "line c0")
    assert float(stroke.attrib["y1"]) - float(stroke.attrib["y2"]) == pytest.approx(
        max(places) - min(places), abs=0.11
    )
