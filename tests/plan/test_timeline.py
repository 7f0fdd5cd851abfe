"""Timelines: idle shares and Perfetto traces."""

import json
from dataclasses import replace

import pytest

from puzzle.errors import UserError
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


SPANS = (
    Span(1, "compute", "a", 0.5, 1.0, "forward", "actor", 3),
    Span(0, "wire", "b", 0.0, 0.25),
    Span(0, "compute", "c", 0.25, 2.0, "norm", "critic"),
)


def test_a_measured_trace_comes_back_to_a_nanosecond() -> None:
    """Ranks are processes and lanes their threads, computation first; categories that are none are phases."""
    trace = json.loads(json.dumps(Timeline(SPANS, "measured").to_perfetto()))
    named = [
        (e["name"], e["pid"], e["tid"], e["args"]["name"]) for e in trace["traceEvents"] if e["ph"] == "M"
    ]
    assert named == [
        ("process_name", 0, 0, "rank 0"),
        ("process_name", 1, 0, "rank 1"),
        ("thread_name", 0, 1, "compute"),
        ("thread_name", 0, 2, "wire"),
        ("thread_name", 1, 3, "compute"),
    ]
    back = Timeline.from_perfetto(trace)
    phases = tuple(replace(s, category=s.category or "phase") for s in SPANS)
    assert back == Timeline(tuple(sorted(phases, key=lambda s: s.start)), "measured")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"ts": 1e16}, None),
        ({"ts": 1.1e16}, "ts must be"),
        ({"ts": -1e16}, None),
        ({"ts": -1.1e16}, "ts must be"),
        ({"dur": 0}, None),
        ({"dur": -1}, "dur must be"),
        ({"dur": 1.1e16}, "dur must be"),
        ({"tid": 7}, "tid must be that of a thread with a name"),
        ({"args": {}}, None),
        ({"args": {"microbatch": -1}}, None),
        ({"args": {"microbatch": -2}}, "microbatch must be"),
        ({"pid": -1}, "pid must be"),
    ],
)
def test_no_other_numbers_are_read(event: dict, words: str | None) -> None:
    trace = Timeline(SPANS[:1]).to_perfetto()
    trace["traceEvents"][-1] |= event
    if words is None:
        assert len(Timeline.from_perfetto(trace).spans) == 1
    else:
        with pytest.raises(UserError, match=words):
            Timeline.from_perfetto(trace)
    trace["otherData"]["source"] = "drawn"
    with pytest.raises(UserError, match=r"source must be simulated or measured|must be"):
        Timeline.from_perfetto(trace)


def test_timelines_after_one_another_begin_where_the_one_before_ended() -> None:
    first, second = Timeline(SPANS[1:]), Timeline((Span(0, "compute", "d", 0.0, 1.5),))
    both = Timeline.after_one_another([first, second, second])
    assert [(s.name, s.start, s.end) for s in both.spans] == [
        ("b", 0.0, 0.25),
        ("c", 0.25, 2.0),
        ("d", 2.0, 3.5),
        ("d", 3.5, 5.0),
    ]
    assert both.source == "simulated"
    assert Timeline.after_one_another([Timeline(SPANS, "measured")]).source == "measured"
    with pytest.raises(ValueError, match="unpack"):
        Timeline.after_one_another([])
