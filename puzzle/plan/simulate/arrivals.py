"""Work that arrives piece by piece, for some who do a piece at a time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def done_at(arrivals: Sequence[float], seconds: float, workers: int) -> float:
    """When the last piece is done, if each takes `seconds` and whoever is free takes the oldest there is."""
    free = [0.0] * workers
    for arrival in sorted(arrivals):
        heapq.heapreplace(free, max(free[0], arrival) + seconds)
    return max(free)
