"""Costs read from a run: what a simulation was given comes back from what ranks could have seen of it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import COLLECTIVES, Action, Op, Schedule
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.measured import action_spans, measured_costs
from puzzle.plan.simulate.simulate import VirtualExecution, makespan, simulate
from puzzle.plan.simulate.timeline import Span, Timeline
from tests.plan.costs import uniform
from tests.plan.single import forward_only, one_f_one_b

PASSES = {"forward": (1.0, 2.0, 1.5), "backward": (2.0, 3.0, 2.5)}
OTHERS = {
    "activation": 0.5,
    "gradient": 0.25,
    "reduce": 1.0,
    "norm": 0.125,
    "step": (0.5, 0.75, 1.0),
    "gather": 2.0,
    "start norm": (0.25, 0.5, 0.375),
    "start gather": 0.5,
}


class Marks(VirtualExecution):
    """A simulation that notes what the clock of a real rank notes: when each action began and ended."""

    def __init__(self, schedule: Schedule, cost: CostTable) -> None:
        super().__init__(schedule, cost.of, starting=cost.starting)
        self.marks: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]

    def _issue(self, stage: int, action: Action) -> bool:
        start = self.clock[stage]
        if done := super()._issue(stage, action):
            self.marks[stage].append((action, start, self.clock[stage]))
        return done


def run(schedule: Schedule, cost: CostTable, copies: int) -> tuple[Timeline, dict[int, int]]:
    """What `copies` ranks per stage would have measured."""
    marks = Marks(schedule, cost)
    assert marks.run() == []
    stage_of = {copies * s + t: s for s in range(schedule.num_stages) for t in range(copies)}
    spans = [span for rank, stage in stage_of.items() for span in action_spans(rank, marks.marks[stage])]
    return Timeline(tuple(spans), "measured"), stage_of


@pytest.mark.parametrize("tied", [False, True])
def test_costs_come_back(tied: bool) -> None:
    cost = CostTable({"actor": PASSES | OTHERS})
    schedule = one_f_one_b(3, 5, optimizer=True, tied=tied)
    timeline, stage_of = run(schedule, cost, copies=2)
    noise = Span(0, "phases", "training", 0.0, 99.0, "phase")
    timeline = replace(timeline, spans=(*timeline.spans, noise))
    found = measured_costs(timeline, stage_of, {"actor"} if tied else ()).seconds["actor"]
    for what, seconds in (PASSES | OTHERS).items():
        given = seconds if isinstance(seconds, tuple) else (seconds,) * 3
        ends = {"activation": [2], "gradient": [0]}.get(what, [])
        want = [None if s in ends else pytest.approx(x) for s, x in enumerate(given)]
        assert found[what] == tuple(want), what


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(1, 8), min_size=8, max_size=8),
)
@settings(max_examples=50)
def test_costs_of_separate_runs_predict_the_fused_one(p: int, a: int, c: int, eighths: list[int]) -> None:
    """Transfers that were always hidden are known by an upper bound only, so here they are free."""
    keys = ("forward", "backward", "step", "gather")
    free = {"activation": 0.0, "gradient": 0.0, "reduce": 0.25, "norm": 0.0}
    tables = [dict(zip(keys, (n / 8 for n in part), strict=True)) for part in (eighths[:4], eighths[4:])]
    cost = CostTable({"actor": tables[0] | free, "critic": tables[1] | free})
    seconds: dict = {}
    for name, m in (("actor", a), ("critic", c)):
        schedule = one_f_one_b(p, m, name, optimizer=True)
        timeline, stage_of = run(schedule, cost, copies=1)
        seconds |= measured_costs(timeline, stage_of).seconds
        assert timeline.makespan == pytest.approx(makespan(schedule, cost))
    fused = schedules.one_f_one_b([PipelineModel("actor", a), PipelineModel("critic", c)], p, "alternating")
    assert makespan(fused, CostTable(seconds)) == pytest.approx(simulate(fused, cost).makespan)


def test_a_stage_without_spans_has_no_cost() -> None:
    schedule, cost = forward_only(2, 4), uniform(["actor"])
    timeline, stage_of = run(schedule, cost, copies=1)
    half = Timeline(tuple(s for s in timeline.spans if s.category != "forward" or s.row == 0), "measured")
    with pytest.raises(UserError, match="no cost of forward of actor on stage 1"):
        simulate(schedule, measured_costs(half, stage_of))


def test_spans_of_actions() -> None:
    """A collective lasts from the end of its start until its wait is over; what its start computes is on the
    compute lane; a started transfer has no end of its own."""
    reduce, wait = Action(Op.REDUCE, "actor"), Action(COLLECTIVES[Op.REDUCE], "actor")
    forward, send = (a for a in forward_only(2, 1).actions[0] if a.op in (Op.FORWARD, Op.SEND))
    marks = [(forward, 0.0, 1.0), (send, 1.0, 1.1), (reduce, 2.0, 2.1), (wait, 3.0, 4.0)]
    spans = [(s.lane, s.category, s.start, s.end) for s in action_spans(7, marks)]
    assert spans == [
        ("compute", "forward", 0.0, 1.0),
        ("compute", "start reduce", 2.0, 2.1),
        ("wait", "wait_reduce", 3.0, 4.0),
        ("reduce", "reduce", 2.1, 4.0),
    ]


def span(row: int, category: str, start: float, end: float, microbatch: int = -1) -> Span:
    return Span(row, "any", category, start, end, category, "actor", microbatch)


def test_passes_cost_their_mean_and_transfers_the_least_seen() -> None:
    """Two ranks on each of two stages, by hand. What compute hides looks longer than it is, so of transfers
    and collectives the shortest sample counts; of passes, all do."""
    spans = [
        # forward of stage 0: 1, 2, 3 and 6 seconds; of stage 1: 2 and 4
        *(span(0, "forward", s, e, m) for m, (s, e) in enumerate([(0.0, 1.0), (1.0, 3.0)])),
        *(span(1, "forward", s, e, m) for m, (s, e) in enumerate([(0.0, 3.0), (3.0, 9.0)])),
        span(2, "forward", 10.0, 12.0, 0),
        span(3, "forward", 10.0, 14.0, 0),
        # hidden states: rank 0 to 2 takes 0.5 and 3.0, rank 1 to 3 takes 0.25 and none (the clocks differ)
        *(span(2, "wait_recv activation", 1.0, e, m) for m, e in enumerate([1.5, 6.0])),
        *(span(3, "wait_recv activation", 3.0, e, m) for m, e in enumerate([3.25, 8.75])),
        # norms, summed over all: the last begins at 20, ranks go on at 20.5, 21, 22 and 23
        *(
            span(r, "norm", s, e)
            for r, (s, e) in enumerate([(19.0, 20.5), (20.0, 21.0), (18.0, 22.0), (17.0, 23.0)])
        ),
        # gathers within a stage: stage 0 begins at 30 and 31, stage 1 at 40 and 44
        *(
            span(r, "gather", s, e)
            for r, (s, e) in enumerate([(30.0, 33.0), (31.0, 32.0), (40.0, 45.0), (44.0, 46.0)])
        ),
        span(9, "forward", 0.0, 99.0, 0),  # of a rank of another pipeline
    ]
    table = measured_costs(Timeline(tuple(spans), "measured"), {0: 0, 1: 0, 2: 1, 3: 1}).seconds["actor"]
    assert table["forward"] == (3.0, 3.0)
    assert table["activation"] == (0.0, None)
    assert table["norm"] == (0.5, 2.0)
    assert table["gather"] == (1.0, 1.0)
    assert "gradient" not in table


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_reduction_starts_with_the_last_of_both_ends(tied: bool) -> None:
    """Three stages of a rank each; the first and the last sum the embedding's gradients."""
    times = [(1.0, 6.0), (2.0, 3.0), (5.0, 7.0)]
    spans = tuple(span(row, "reduce", *time) for row, time in enumerate(times))
    table = measured_costs(Timeline(spans, "measured"), {0: 0, 1: 1, 2: 2}, {"actor"} if tied else ())
    assert table.seconds["actor"]["reduce"] == ((1.0, 1.0, 2.0) if tied else (5.0, 1.0, 2.0))


def test_spans_of_one_microbatch_pair_up_in_the_order_of_time() -> None:
    """Two steps of one micro-batch: the first wait is of the first pass, in whatever order spans come."""
    first = [span(0, "forward", 0.0, 1.0, 0), span(1, "wait_recv activation", 0.0, 1.5, 0)]
    second = [span(0, "forward", 10.0, 11.0, 0), span(1, "wait_recv activation", 10.0, 12.0, 0)]
    table = measured_costs(Timeline((*second, *first), "measured"), {0: 0, 1: 1}).seconds["actor"]
    assert table["activation"] == (0.5, None)
    assert table["forward"] == (1.0, None)


@given(st.lists(st.floats(-5.0, 5.0), min_size=3, max_size=3), st.booleans())
def test_whatever_clocks_of_ranks_differ_by_nothing_costs_less_than_no_time(
    ahead: list[float], tied: bool
) -> None:
    """A run whose every rank has a clock of its own: its costs can be simulated, drawn and read back."""
    schedule = one_f_one_b(3, 4, optimizer=True, tied=tied)
    timeline, stage_of = run(schedule, CostTable({"actor": PASSES | OTHERS}), copies=1)
    spans = tuple(replace(s, start=s.start + ahead[s.row], end=s.end + ahead[s.row]) for s in timeline.spans)
    table = measured_costs(Timeline(spans, "measured"), stage_of, {"actor"} if tied else ())
    rows = [row for kinds in table.seconds.values() for row in kinds.values()]
    assert all(x is None or x >= 0 for row in rows for x in (row if isinstance(row, tuple) else (row,)))
    drawn = simulate(schedule, table)
    assert len(Timeline.from_perfetto(drawn.to_perfetto()).spans) == len(drawn.spans)
