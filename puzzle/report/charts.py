"""Line charts as SVG text without scripts; colours are CSS variables of the page around them.

A chart of three points shows them; one of thousands shows means of neighbours, and their extremes as a band.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from puzzle.runlog.records import readable

MOST_BINS = 200
"""Points of a line that are drawn; more are put together."""
MARKED = 40
"""Lines of so many points, or fewer, show each one."""
WIDTH, HEIGHT = 380.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 18.0, 10.0, 30.0
LARGEST = 1e100  # what is larger, or not a number, is no point


@dataclass(frozen=True)
class Bin:
    """Neighbouring points: where they lie on average, their mean, least and largest value, and how many."""

    x: float
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Line:
    """One series: (x, y) in order of x. `colour` numbers the page's colours. `spread`: half the width of an
    interval around each y, as long as `points`, or empty."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    spread: Sequence[float] = ()


def bins(points: Sequence[tuple[float, float]], most: int = MOST_BINS) -> list[Bin]:
    """The points that can be drawn, in at most `most` bins of (nearly) as many neighbours each."""
    good = [(x, y) for x, y in points if abs(y) < LARGEST]  # NaN is none
    count = min(most, len(good))
    edges = [round(number * len(good) / count) for number in range(count + 1)] if count else [0]
    found = []
    for start, end in pairwise(edges):
        values = [y for _, y in good[start:end]]
        place = math.fsum(x for x, _ in good[start:end]) / len(values)
        mean = math.fsum(values) / len(values)
        found.append(Bin(place, mean, min(values), max(values), len(values)))
    return found


def ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, near `about` of them: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    steps = [power * factor for factor in (1, 2, 5, 10)]
    if whole:
        steps = [max(1.0, round(step)) for step in steps]
    step = min(steps, key=lambda step: abs(span / step - about))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def chart(lines: Sequence[Line], what: str) -> str | None:
    """The lines over iterations, with an axis of round numbers; None where nothing can be drawn. `what` is
    told to those who cannot see it."""
    drawn = [(line, bins(line.points)) for line in lines]
    drawn = [(line, found) for line, found in drawn if found]
    if not drawn:
        return None
    frame = _Frame.around(drawn)
    text = html.escape(what)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{text}">'
    return "".join([head, *frame.axes(), *(part for pair in drawn for part in frame.line(*pair)), "</svg>"])


@dataclass(frozen=True)
class _Frame:
    """The numbers that the edges of a chart stand for."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def around(cls, drawn: Sequence[tuple[Line, list[Bin]]]) -> _Frame:
        places = [x for line, _ in drawn for x, y in line.points if abs(y) < LARGEST]
        lows = [one.low for _, found in drawn for one in found]
        highs = [one.high for _, found in drawn for one in found]
        for line, _ in drawn:
            for (_, y), half in zip(line.points, line.spread, strict=False):
                if abs(y) < LARGEST and abs(half) < LARGEST:
                    lows.append(y - half)
                    highs.append(y + half)
        low, high = min(lows), max(highs)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(min(places), max(places), low - pad, high + pad)

    def x(self, value: float) -> float:
        """In user units; a single place is in the middle."""
        share = (value - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> list[str]:
        parts = []
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">')
            parts.append(f"{_label(value)}</text>")
        for value in ticks(self.x0, self.x1, 5, whole=True):
            place = f'x="{self.x(value):.1f}" y="{HEIGHT - 10:g}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{value:g}</text>')
        return parts

    def line(self, line: Line, found: list[Bin]) -> list[str]:
        colour = f"c{line.colour}"
        parts = []
        if line.spread and len(found) > MARKED:
            parts.append(self._interval(line))
        elif any(one.count > 1 for one in found):
            edge = [(one.x, one.high) for one in found] + [(one.x, one.low) for one in reversed(found)]
            parts.append(f'<polygon class="band {colour}" points="{self._path(edge)}"/>')
        if len(found) > 1:
            path = self._path([(one.x, one.mean) for one in found])
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(found) <= MARKED:
            for (x, y), half in zip(line.points, line.spread, strict=False):
                if abs(y) < LARGEST and abs(half) < LARGEST:
                    place = f'x1="{self.x(x):.1f}" x2="{self.x(x):.1f}"'
                    ends = f'y1="{self.y(y - half):.1f}" y2="{self.y(y + half):.1f}"'
                    parts.append(f'<line class="line {colour}" {place} {ends}/>')
            for one in found:
                place = f'cx="{self.x(one.x):.1f}" cy="{self.y(one.mean):.1f}"'
                told = f"{html.escape(line.name)}: {readable(one.mean)} at {one.x:g}"
                parts.append(f'<circle class="dot {colour}" {place} r="3"><title>{told}</title></circle>')
        return parts

    def _interval(self, line: Line) -> str:
        """The intervals of many points as a band."""
        pairs = list(zip(line.points, line.spread, strict=False))
        pairs = [((x, y), half) for (x, y), half in pairs if abs(y) < LARGEST and abs(half) < LARGEST]
        highs = [(one.x, one.mean) for one in bins([(x, y + half) for (x, y), half in pairs])]
        lows = [(one.x, one.mean) for one in bins([(x, y - half) for (x, y), half in pairs])]
        return f'<polygon class="band c{line.colour}" points="{self._path(highs + lows[::-1])}"/>'

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _label(value: float) -> str:
    """Of a tick, in few characters and without the dust of floating-point steps (0.30000000000000004)."""
    text = readable(float(f"{value:.10g}"))
    return f"{value:.2g}" if "e" in text else text
