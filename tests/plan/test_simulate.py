"""Virtual time against closed forms and hand-made examples."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import Op
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import simulate
from tests.plan.costs import uniform
from tests.plan.single import forward_only, one_f_one_b

costs = st.integers(1, 5)


@given(st.integers(1, 7), st.integers(1, 14), costs, costs, st.booleans())
def test_1f1b_closed_form(p: int, m: int, f: int, b: int, optimizer: bool) -> None:
    schedule = one_f_one_b(p, m, optimizer=optimizer)
    timeline = simulate(schedule, uniform(["actor"], f, b))
    assert timeline.makespan == (m + p - 1) * (f + b)
    assert timeline.bubble_share() == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.busy(0) == m * (f + b)


@given(st.integers(1, 7), st.integers(1, 14), st.integers(0, 5))
def test_forward_only_closed_form_with_transfers(p: int, m: int, transfer: int) -> None:
    """Transfers run beside compute: only the slower of both counts per micro-batch, and every hop once."""
    timeline = simulate(forward_only(p, m), uniform(["actor"], 3, activation=transfer))
    period = max(3, transfer) if p > 1 else 3
    assert timeline.makespan == p * 3 + (p - 1) * transfer + (m - 1) * period


@given(st.lists(costs, min_size=1, max_size=6), st.integers(1, 9))
def test_uneven_stages_run_at_the_pace_of_the_slowest(stages: list[int], m: int) -> None:
    cost = CostTable({"actor": {"forward": tuple(map(float, stages)), "activation": 0.0}})
    assert simulate(forward_only(len(stages), m), cost).makespan == sum(stages) + (m - 1) * max(stages)


def test_a_transfer_needs_both_sides() -> None:
    timeline = simulate(one_f_one_b(2, 1), uniform(["actor"], 1, 1, activation=2, gradient=2))
    spans = {(s.row, s.category): (s.start, s.end) for s in timeline.spans if s.lane != "wait"}
    assert spans == {
        (0, "forward"): (0, 1),
        (0, "activation"): (1, 3),
        (1, "forward"): (3, 4),
        (1, "backward"): (4, 5),
        (1, "gradient"): (5, 7),
        (0, "backward"): (7, 8),
    }
    assert {s.lane for s in timeline.spans} == {"compute", "activation to 1", "gradient to 0", "wait"}


def test_norms_meet_and_the_rest_of_the_optimizer_does_not() -> None:
    cost = uniform(["actor"], 1, 1, reduce=1, norm=0.5, step=0.25, gather=2)
    timeline = simulate(one_f_one_b(2, 1, optimizer=True), cost)
    spans = {(s.row, s.category): (s.start, s.end) for s in timeline.spans}
    assert spans[1, "reduce"] == (3, 4)
    assert spans[0, "reduce"] == (4, 5)
    assert spans[0, "norm"] == spans[1, "norm"] == (5, 5.5)
    assert spans[0, "step"] == (5.5, 5.75)
    assert timeline.makespan == 7.75


def test_what_a_collective_computes_first_occupies_the_stage() -> None:
    costs = uniform(["actor"], 1, 1, norm=0.5, step=0.25).seconds["actor"]
    cost = CostTable({"actor": {**costs, "start norm": 2.0, "start gather": (3.0, 4.0)}})
    timeline = simulate(one_f_one_b(2, 1, optimizer=True), cost)
    spans = {(s.row, s.category): (s.start, s.end, s.lane) for s in timeline.spans}
    assert spans[0, "start norm"] == (4, 6, "compute")
    assert spans[1, "start norm"] == (3, 5, "compute")
    assert spans[0, "norm"][:2] == (6, 6.5)
    assert spans[1, "start gather"] == (6.75, 10.75, "compute")
    assert timeline.makespan == 10.75


def test_tied_reductions_join_the_ends() -> None:
    cost = uniform(["actor"], 1, 1, reduce=1)
    timeline = simulate(one_f_one_b(3, 1, optimizer=True, tied=True), cost)
    starts = {s.row: s.start for s in timeline.spans if s.category == "reduce"}
    assert starts == {0: 6, 1: 5, 2: 6}


def test_deadlocks_and_missing_costs_are_said() -> None:
    schedule = one_f_one_b(2, 2)
    stage = tuple(a for a in schedule.actions[0] if a.op is not Op.SEND)
    with pytest.raises(
        ValueError, match="deadlocks: stage 0 waits in wait_send actor 0 activation to 1; stage 1"
    ):
        simulate(replace(schedule, actions=(stage, schedule.actions[1])), uniform(["actor"]))
    with pytest.raises(UserError, match="no cost of backward of actor on stage 1"):
        simulate(schedule, CostTable({"actor": {"forward": 1.0, "activation": 0.0}}))
    with pytest.raises(UserError, match="no cost of forward of actor on stage 1"):
        simulate(schedule, CostTable({"actor": {"forward": (1.0,), "backward": 1.0, "activation": 0.0}}))
