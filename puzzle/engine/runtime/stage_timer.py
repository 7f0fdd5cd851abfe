"""Seconds of the stages of an iteration, such that they add up on every rank, and the memory they took."""

from __future__ import annotations

import time

import torch

from puzzle.engine.runtime.world import World
from puzzle.plan.simulate.timeline import Span


class StageClock:
    """Marks the ends of stages. A stage ends when the slowest rank's device has done its work.

    The time of a mark is the largest over ranks since the common start, so differences of marks are exclusive
    and add up to the whole. `peaks` are the most bytes of tensors on this rank's device by stage, empty on a
    CPU.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._names: list[str] = []
        self._marks: list[float] = []
        self.peaks: dict[str, int] = {}
        world.synchronize()
        world.sum(torch.zeros(1, device=world.device))  # a barrier: all ranks start together
        world.synchronize()
        take_peak(world.device)
        self._start = time.perf_counter()

    def end(self, stage: str) -> None:
        """What happened since the last mark belongs to `stage`; a stage may be named more than once."""
        self.world.synchronize()
        self._names.append(stage)
        self._marks.append(time.perf_counter() - self._start)
        peak = take_peak(self.world.device)
        if peak is not None:
            self.peaks[stage] = max(peak, self.peaks.get(stage, 0))

    def spans(self, row: int) -> list[Span]:
        """The stages as this rank saw them."""
        starts = [0.0, *self._marks]
        ends = zip(self._names, starts, self._marks, strict=False)
        return [Span(row, "stage", name, start, end, category="stage") for name, start, end in ends]

    def seconds(self, stages: tuple[str, ...]) -> tuple[dict[str, float], float]:
        """(seconds per stage, in all); call on every rank."""
        marks = torch.tensor(self._marks, dtype=torch.float64, device=self.world.device)
        ends = self.world.max(marks).tolist()
        found = dict.fromkeys(stages, 0.0)
        for name, start, end in zip(self._names, [0.0, *ends], ends, strict=False):
            found[name] += end - start
        return found, sum(found.values())


def take_peak(device: torch.device) -> int | None:
    """Most bytes of tensors on the device since the last call; None for a CPU, which does not count them."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
