"""Pieces of work for few hands, against a clock that ticks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from puzzle.plan.simulate.arrivals import done_at


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 7), st.integers(1, 4))
def test_the_last_piece_is_done_as_a_clock_says(arrivals: list[int], seconds: int, workers: int) -> None:
    """Tick by tick: whoever is free takes a piece that is there."""
    waiting, left, now = sorted(arrivals), [0] * workers, 0
    while waiting or any(left):
        for hand in range(workers):
            if not left[hand] and waiting and waiting[0] <= now:
                waiting.pop(0)
                left[hand] = seconds
        left = [max(0, ticks - 1) for ticks in left]
        now += 1
    assert done_at(arrivals, float(seconds), workers) == now
