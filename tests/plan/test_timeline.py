"""Timelines: idle shares and Perfetto traces."""

import json

import pytest

from puzzle.plan.simulate.simulate import simulate
from puzzle.plan.simulate.timeline import Span, Timeline
from tests.plan.costs import uniform
from tests.plan.single import one_f_one_b


def test_busy_counts_overlap_once() -> None:
    spans = (Span(0, "compute", "a", 1, 3), Span(0, "compute", "b", 2, 4), Span(0, "compute", "c", 5, 6))
    timeline = Timeline((*spans, Span(1, "compute", "d", 1, 6), Span(1, "wire", "e", 0, 11)), "measured")
    assert (timeline.busy(0), timeline.busy(1), timeline.makespan) == (4, 5, 11)
    assert timeline.bubble_share() == pytest.approx(1 - 9 / 22)
    assert Timeline(()).makespan == Timeline(()).bubble_share() == 0


def test_perfetto_traces() -> None:
    timeline = simulate(one_f_one_b(3, 2), uniform(["actor"], 1e-3, 2e-3, activation=1e-4))
    trace = json.loads(json.dumps(timeline.to_perfetto()))
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == len(timeline.spans)
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 1", 2: "stage 2"}
    first = complete[0]
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("forward actor 0", "forward", 0, 1000)
    # Perfetto draws the slices of a thread as a stack: they must not cross.
    for thread in {e["tid"] for e in complete}:
        ends = 0.0
        for event in sorted((e for e in complete if e["tid"] == thread), key=lambda e: e["ts"]):
            assert event["ts"] >= ends - 1e-6
            ends = event["ts"] + event["dur"]
    back = Timeline.from_perfetto(trace)
    assert back.source == "simulated"
    assert [s.name for s in back.spans] == [
        s.name for s in sorted(timeline.spans, key=lambda s: (s.start, s.row, s.lane))
    ]
    assert back.makespan == pytest.approx(timeline.makespan)
    assert back.bubble_share() == pytest.approx(timeline.bubble_share())
