"""Between measured points: what takes longer with more work, by the points beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def no_longer(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """In ascending order, and none longer than one of more work: hosts are disturbed, the least says most."""
    least, found = math.inf, []
    for amount, seconds in sorted(points, reverse=True):
        least = min(least, seconds)
        found.append((amount, least))
    return found[::-1]


def linear(points: Sequence[tuple[float, float]], x: float) -> float:
    """Between points, and on along the first or the last two of them, but not below the first one's y on
    the left."""
    if len(points) == 1:
        return points[0][1]
    if x <= points[0][0]:
        return points[0][1]
    pair = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[pair - 1 : pair + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def by_rate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Seconds of an amount x from (amount, seconds) in ascending order: the rate is linear in log x between
    points and constant beyond the last; less than the first amount takes as long as that."""
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return x * points[-1][1] / points[-1][0]
    logs = [(math.log(amount), amount / seconds) for amount, seconds in points]
    return x / linear(logs, math.log(x))
