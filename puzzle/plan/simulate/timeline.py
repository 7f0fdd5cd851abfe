"""What happened when: one type for simulated and measured time, written as a Perfetto trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from puzzle.files.jsonio import Fields

COMPUTE_LANE = "compute"
MOST_SECONDS = 1e10
"""Centuries; what is read beyond is no time, and its sums would not be finite."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` to `end` seconds on a lane (a stream: "compute", a channel, ...) of
    a row (a stage of a simulated plan, a rank of a measured run). `category` is the op of an action, or a
    phase."""

    row: int
    lane: str
    name: str
    start: float
    end: float
    category: str = ""
    model: str = ""
    microbatch: int = -1

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Spans in any order, all on one clock in seconds."""

    spans: tuple[Span, ...]
    source: Literal["simulated", "measured"] = "simulated"

    @classmethod
    def after_one_another(cls, timelines: Sequence[Timeline]) -> Timeline:
        """Timelines that start at 0, each moved to where the one before ends. ValueError without any."""
        spans: list[Span] = []
        begin = 0.0
        for timeline in timelines:
            spans += [replace(s, start=s.start + begin, end=s.end + begin) for s in timeline.spans]
            begin += timeline.makespan
        (source,) = {timeline.source for timeline in timelines}
        return cls(tuple(spans), source)

    @property
    def rows(self) -> tuple[int, ...]:
        """The stages or ranks that have spans, sorted."""
        return tuple(sorted({s.row for s in self.spans}))

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end; 0 without spans."""
        return max((s.end for s in self.spans), default=0.0) - min((s.start for s in self.spans), default=0.0)

    def busy(self, row: int, lane: str = COMPUTE_LANE) -> float:
        """Seconds in which at least one span of the lane runs."""
        total, until = 0.0, float("-inf")
        for span in sorted((s for s in self.spans if (s.row, s.lane) == (row, lane)), key=lambda s: s.start):
            total += max(0.0, span.end - max(span.start, until))
            until = max(until, span.end)
        return total

    def bubble_share(self) -> float:
        """Idle part of the makespan on compute lanes, the mean over rows; 0 for an empty timeline."""
        if self.makespan == 0:
            return 0.0
        return 1 - sum(map(self.busy, self.rows)) / (len(self.rows) * self.makespan)

    def to_perfetto(self) -> dict[str, Any]:
        """Chrome trace events (Perfetto and chrome://tracing read them): a process per row, a thread per
        lane."""
        lanes = sorted({(s.row, s.lane != COMPUTE_LANE, s.lane) for s in self.spans})
        threads = {(row, lane): tid for tid, (row, _, lane) in enumerate(lanes, start=1)}
        word = "stage" if self.source == "simulated" else "rank"
        events = [_metadata("process_name", row, 0, f"{word} {row}") for row in self.rows]
        events += [_metadata("thread_name", row, tid, lane) for (row, lane), tid in threads.items()]
        events += [
            {
                "name": s.name,
                "cat": s.category or "phase",
                "ph": "X",
                "ts": s.start * 1e6,
                "dur": s.seconds * 1e6,
                "pid": s.row,
                "tid": threads[s.row, s.lane],
                "args": {"model": s.model, "microbatch": s.microbatch},
            }
            for s in sorted(self.spans, key=lambda s: (s.start, s.row, s.lane))
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"source": self.source}}

    @classmethod
    def from_perfetto(cls, trace: Any, place: str = "trace") -> Timeline:
        """Reads back what `to_perfetto` wrote, to a nanosecond. UserError at `place` for others."""
        fields = Fields(trace, place)
        events = fields.objects("traceEvents")
        lanes = {
            (e.integer("pid"), e.integer("tid")): e.section("args").text("name")
            for e in events
            if e.text("name") == "thread_name"
        }
        spans = tuple(_span(e, lanes) for e in events if e.text("ph") == "X")
        source = fields.section("otherData").text("source")
        if source not in ("simulated", "measured"):
            fields.section("otherData").refuse("source", "simulated or measured")
        return cls(spans, source)


def _span(event: Fields, lanes: Mapping[tuple[int, int], str]) -> Span:
    row, thread = event.integer("pid"), event.integer("tid")
    if (row, thread) not in lanes:
        event.refuse("tid", "that of a thread with a name")
    most = MOST_SECONDS * 1e6
    start, args = event.number("ts", least=-most, most=most), event.section("args")
    return Span(
        row,
        lanes[row, thread],
        event.text("name"),
        start / 1e6,
        (start + event.number("dur", least=0.0, most=most)) / 1e6,
        event.text("cat"),
        args.text("model", ""),
        args.integer("microbatch", -1, least=-1),
    )


def _metadata(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
