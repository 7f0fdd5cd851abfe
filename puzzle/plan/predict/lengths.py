"""How long responses are, and how many of them a decode pass has as they end: the queue of a replica."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.errors import UserError

POINTS = 256
"""Quantiles that a distribution is known by."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples' fractions are spread evenly, and in no order: as if drawn, but the same every time."""


@dataclass(frozen=True)
class Lengths:
    """Response lengths in tokens, ascending: quantiles of a distribution, or what was observed."""

    values: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for what are no lengths."""
        if not self.values or self.values[0] < 1 or list(self.values) != sorted(self.values):
            raise ValueError("lengths must be ascending whole numbers of at least 1")

    @classmethod
    def exponential(cls, mean: float, most: int) -> Lengths:
        """Exponential ones of a mean, cut at `most` (so that their mean is a little less), rounded up."""
        middles = ((i + 0.5) / POINTS for i in range(POINTS))
        return cls(tuple(min(most, max(1, math.ceil(-mean * math.log(1 - q)))) for q in middles))

    @classmethod
    def observed(cls, lengths: Sequence[int], most: int) -> Lengths:
        """Those that were seen, cut at `most`. UserError for none, or for what is no length."""
        if not lengths or min(lengths) < 1:
            raise UserError("lengths of responses must be whole numbers of at least 1, at least one of them")
        return cls(tuple(sorted(min(most, length) for length in lengths)))

    @property
    def mean(self) -> float:
        """Tokens of a response."""
        return sum(self.values) / len(self.values)

    def drawn(self, count: int) -> list[int]:
        """As many lengths, by even quantiles, in an order that looks like chance."""
        order = sorted(range(count), key=lambda i: i * GOLDEN % 1)
        even = [self.values[int((i + 0.5) / count * len(self.values))] for i in range(count)]
        return [even[i] for i in order]


@dataclass(frozen=True)
class Stretch:
    """`steps` decode steps of `active` sequences, which attend to `grown` tokens of their responses on
    average, the newest included."""

    steps: int
    active: int
    grown: float


def stretches(lengths: Sequence[int], slots: int) -> list[Stretch]:
    """What decode passes have as sequences end and the next ones of the queue take their slots.

    A response of L tokens takes L - 1 steps: its first token comes with the prompt. The sum of steps x active
    is that of all these steps. O(n log slots).
    """
    waiting = [length - 1 for length in lengths if length > 1][::-1]
    running: list[int] = []
    """The step at which each ends."""
    begun = 0  # sum of the steps at which the running ones began
    began: dict[int, list[int]] = {}
    clock, found = 0, []
    while waiting or running:
        while waiting and len(running) < slots:
            steps = waiting.pop()
            heapq.heappush(running, clock + steps)
            began.setdefault(clock + steps, []).append(clock)
            begun += clock
        until = running[0]
        active = len(running)
        grown = (clock + until + 1) / 2 - begun / active
        found.append(Stretch(until - clock, active, grown))
        clock = until
        while running and running[0] == clock:
            heapq.heappop(running)
        begun -= sum(began.pop(clock))
    return found


def merged(found: Sequence[Stretch]) -> list[Stretch]:
    """The same steps in at most `POINTS` stretches; sequences and grown tokens are their means."""
    share = -(-sum(one.steps for one in found) // POINTS)
    made: list[Stretch] = []
    for one in found:
        last = made[-1] if made else None
        if last is None or last.steps + one.steps > share:
            made.append(one)
            continue
        steps = last.steps + one.steps
        active = (last.steps * last.active + one.steps * one.active) / steps
        grown = (last.steps * last.grown + one.steps * one.grown) / steps
        made[-1] = Stretch(steps, max(1, round(active)), grown)
    return made
