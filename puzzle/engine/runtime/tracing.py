"""When a rank did what: action by action in chosen iterations, then summed up and drawn for all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from puzzle.plan.pipeline.actions import COLLECTIVES, COMPUTE, Action, RingSpec, Schedule
from puzzle.plan.simulate.measured import action_spans
from puzzle.plan.simulate.timeline import Span, Timeline

if TYPE_CHECKING:
    from puzzle.engine.runtime.world import World


BUSY = COMPUTE | COLLECTIVES.keys()
"""What occupies a stage: passes, steps, and what the start of a collective computes."""


class Instant:
    """A moment of the host (seconds) or of a CUDA stream (an event)."""

    def __init__(self, device: torch.device) -> None:
        self.host = time.perf_counter()
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        if self.event is None or earlier.event is None:
            return self.host - earlier.host
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass
class _Run:
    """One execution of a schedule, which may be known only at its end."""

    stage: str
    schedule: Schedule | None = None
    marks: list[tuple[Action, Instant, Instant]] = field(default_factory=list)


class Clock:
    """Start and end of every pass and wait of one rank, by host clock or by device events.

    All ranks make theirs at the same moment: times count from there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runs: list[_Run] = []
        self._notes: list[tuple[str, str, str, Instant, Instant]] = []
        self._host: list[tuple[str, str, float, float]] = []
        self._origin = self.now()

    def now(self) -> Instant:
        """A point in time of the current stream."""
        return Instant(self.device)

    def begin(self, stage: str) -> None:
        """What is marked from now on belongs to a new run of a stage."""
        self._runs.append(_Run(stage))

    def end(self, schedule: Schedule) -> None:
        """The run is over; it was one of `schedule`."""
        self._runs[-1].schedule = schedule

    def mark(self, action: Action, start: Instant) -> None:
        """The action began at `start` and ends now."""
        self._runs[-1].marks.append((action, start, self.now()))

    def note(self, lane: str, name: str, model: str, start: Instant) -> None:
        """Something beside the actions began at `start` and ends now."""
        self._notes.append((lane, name, model, start, self.now()))

    def host_span(self, lane: str, name: str, began: float, ended: float) -> None:
        """Something of the host alone, between two moments of `time.perf_counter`."""
        self._host.append((lane, name, began, ended))

    def runs(self) -> list[tuple[str, Schedule | None, list[tuple[Action, float, float]]]]:
        """(stage, schedule, its actions with start and end in seconds); waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            (run.stage, run.schedule, [(a, s - self._origin, e - self._origin) for a, s, e in run.marks])
            for run in self._runs
        ]

    def passes(self, row: int, stages: str = "") -> list[Span]:
        """What was marked, as spans of a timeline's row; only in stages whose name begins with `stages`."""
        runs = (marks for stage, _, marks in self.runs() if stage.startswith(stages))
        return [span for marks in runs for span in action_spans(row, marks)]

    def spans(self, row: int) -> list[Span]:
        """Everything as spans of a timeline's row."""
        found = self.passes(row)
        for lane, name, model, start, end in self._notes:
            times = (start - self._origin, end - self._origin)
            found.append(Span(row, lane, name, *times, category="collective", model=model))
        for lane, name, began, ended in self._host:
            times = (began - self._origin.host, ended - self._origin.host)
            found.append(Span(row, lane, name, *times, category="host"))
        return found


def stage_records(world: World, clock: Clock) -> list[dict[str, Any]]:
    """Fields of a `stage` record for every stage that ran on rank 0; call on every rank.

    The bubble share is over all runs and ranks: the part of the runs' time in which no layer or optimizer
    step ran.
    """
    first: dict[str, Schedule] = {}
    own: dict[str, list[tuple[float, float, float]]] = {}
    for stage, schedule, marks in clock.runs():
        if not marks or schedule is None:
            continue
        busy = sum(end - start for action, start, end in marks if action.op in BUSY)
        own.setdefault(stage, []).append((marks[0][1], marks[-1][2], busy))
        first.setdefault(stage, schedule)
    everyone = world.gather(own)
    records = []
    for stage, schedule in first.items():
        # A replica without sequences generates nothing.
        rows = [found[stage] for found in everyone if stage in found]
        spent = busy = 0.0
        for column in zip_longest(*rows):
            runs = [run for run in column if run is not None]
            spent += max(end for _, end, _ in runs) - min(start for start, _, _ in runs)
            busy += sum(share for _, _, share in runs) / len(runs)
        records.append(
            {
                "name": stage,
                "schedule": schedule.name,
                "hash": schedule.hash,
                "actions": schedule.counts(),
                "flushes": schedule.flushes,
                "bubble_share": max(0.0, 1.0 - busy / spent) if spent else 0.0,
                **_rings(schedule),
            }
        )
    return records


def _rings(schedule: Schedule) -> dict[str, Any]:
    """How many micro-batches a decode ring has, of at most how many sequences, and its rounds."""
    for spec in schedule.specs:
        if isinstance(spec, RingSpec):
            return {
                "microbatches": {
                    "prefill": len(spec.passes),
                    "prefill_sequences": max(spec.passes, default=0),
                    "decode": len(spec.decode),
                    "decode_sequences": spec.decode[0],
                    "rounds": spec.rounds,
                }
            }
    return {}


def gathered(world: World, spans: list[Span]) -> Timeline:
    """Every rank's spans in one timeline, on every rank."""
    return Timeline(tuple(span for row in world.gather(spans) for span in row), "measured")
