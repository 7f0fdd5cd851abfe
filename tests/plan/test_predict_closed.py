"""Closed forms of the planner against schedules in virtual time, and against exact switch plans."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import Schedule
from puzzle.plan.pipeline.schedules import PipelineModel, in_flight
from puzzle.plan.predict.recurrences import (
    StageCosts,
    forward_makespan,
    training_least,
    training_makespan,
)
from puzzle.plan.predict.shares import local_share
from puzzle.plan.reshard.plan import plan_switch
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import makespan
from puzzle.spec.model import ModelSpec
from tests.plan.costs import uniform
from tests.plan.measures import peak_in_flight

FREE = uniform(["model"]).seconds["model"]


SECONDS = st.integers(0, 9).map(float)
Stream = tuple[list[StageCosts], list[int]]
Build = Callable[..., Schedule]
FEW = settings(max_examples=40, deadline=None)


@st.composite
def streams(draw, split: bool = False, even: bool | None = None):
    """A model with any costs per stage, or several with one per model (`even`: only these; False: any)."""
    pp, models = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    even = models > 1 if even is None else even
    rows = SECONDS.map(lambda one: [one] * pp) if even else st.lists(SECONDS, min_size=pp, max_size=pp)
    costs = []
    for _ in range(models):
        forward, rest, weights = draw(rows), draw(rows), draw(rows)
        backward = tuple(a + b for a, b in zip(rest, weights, strict=True))
        costs.append(StageCosts(tuple(forward), backward, tuple(weights) if split else ()))
    return costs, [draw(st.integers(1, 9)) for _ in costs]


def simulated(stream: Stream, build: Build, hop: float = 0.0) -> float:
    costs, counts = stream
    models = [PipelineModel(f"m{i}", count) for i, count in enumerate(counts)]
    seconds = {}
    for model, cost in zip(models, costs, strict=True):
        weights = cost.weights or (0.0,) * len(cost.forward)
        rest = tuple(a - b for a, b in zip(cost.backward or weights, weights, strict=True))
        passes = {"forward": cost.forward, "backward": cost.backward, "backward_input": rest}
        hops = {"activation": hop, "gradient": hop}
        seconds[model.name] = {**FREE, **passes, **hops, "backward_weight": weights}
    return makespan(build(models, len(costs[0].forward)), CostTable(seconds))


trained = partial(schedules.one_f_one_b, optimizer=False)
trained_split = partial(trained, split=True)


@FEW
@given(streams())
def test_training_takes_what_its_schedule_takes(stream) -> None:
    assert training_makespan(*stream) == simulated(stream, trained)


@FEW
@given(streams(split=True, even=True))
def test_split_training_takes_what_its_schedule_takes(stream) -> None:
    assert training_makespan(*stream) == simulated(stream, trained_split)


@FEW
@given(streams(split=True, even=False), st.booleans())
def test_no_schedule_takes_less(stream, split: bool) -> None:
    """Where stages of several models differ, a stage may also wait until its message is received."""
    costs, counts = stream
    if split:
        assert training_makespan(costs, counts) <= simulated(stream, trained_split)
    whole = [StageCosts(c.forward, c.backward) for c in costs]
    assert training_makespan(whole, counts) <= simulated((whole, counts), trained)


@FEW
@given(streams(), st.booleans(), st.integers(0, 9))
def test_training_never_takes_less_than_its_bound(stream, split: bool, hop: int) -> None:
    """And takes that where stages are alike, of one model."""
    costs, counts = stream
    weights = [tuple(0.5 * one for one in c.backward) if split else () for c in costs]
    later = [StageCosts(c.forward, c.backward, w, hop) for c, w in zip(costs, weights, strict=True)]
    assert training_least(later, counts) <= training_makespan(later, counts) + 1e-9
    forward, backward = ((passes[0],) * len(passes) for passes in (costs[0].forward, costs[0].backward))
    alike = [StageCosts(forward, backward)]
    assert training_least(alike, counts[:1]) == training_makespan(alike, counts[:1])


@FEW
@given(streams(even=False))
def test_inference_takes_what_its_schedule_takes(stream) -> None:
    assert forward_makespan(*stream) == simulated(stream, schedules.forward_only)


@FEW
@given(streams(even=False), st.integers(1, 9))
def test_messages_delay_by_no_less_than_a_hop(stream, hop: int) -> None:
    """Real transfers also wait for each other and for their receivers, so that the hop alone is a bound."""
    costs, counts = stream
    later = [StageCosts(c.forward, c.backward, hop=hop) for c in costs]
    assert forward_makespan(later, counts) <= simulated(stream, schedules.forward_only, hop)
    exact = simulated(stream, trained, hop)
    assert training_makespan(costs, counts) <= training_makespan(later, counts) <= exact


@FEW
@given(st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_in_flight_is_what_schedules_keep(pp: int, count: int, split: bool) -> None:
    build = schedules.one_f_one_b([PipelineModel("m", count)], pp, split=split)
    ones, none = {"m": [1.0] * pp}, {"m": [0.0] * pp}
    before = peak_in_flight(build, ones, none if split else ones)
    assert before == tuple(in_flight(pp, s, count)[0] for s in range(pp))
    kept = [sum(in_flight(pp, s, count, split and pp > 1)) for s in range(pp)]
    # Where a run is short, its last backwards' weights follow at once: the closed form is then one too many.
    assert all(a <= b for a, b in zip(peak_in_flight(build), kept, strict=True))
    if count >= 2 * pp or not split:
        assert list(peak_in_flight(build)) == kept


SPEC = ModelSpec("llama", 4096, 128, 4096, 16, 16, 16, 8)
POWERS = (1, 2, 4, 8, 16)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((2, 4, 8, 16)), st.data())
def test_local_share_is_that_of_exact_plans(world: int, data: st.DataObject) -> None:
    """Layouts of powers of two; norms are 0.2 % of this model and lie whole on every tensor rank."""
    choices = [(t, p, world // t // p) for t in POWERS for p in POWERS if t * p <= world]
    source, destination = (Layout.even(*data.draw(st.sampled_from(choices)), 16) for _ in range(2))
    ranks = Placement.default(source), Placement.default(destination)
    exact = plan_switch(SPEC, *ranks, Cluster(world)).local_share
    assert local_share(source, destination) == pytest.approx(exact, abs=0.004)
