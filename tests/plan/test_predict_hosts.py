"""Hosts that run ahead of their devices: against brute force over who waits for whom, and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.layout import Layout
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.iteration import (
    Part,
    Workload,
    inference_seconds,
    pipeline_costs,
    step_seconds,
    training_bound,
    training_seconds,
)
from puzzle.plan.predict.recurrences import (
    StageCosts,
    forward_makespan,
    issued,
    training_least,
    training_makespan,
)
from puzzle.spec.published import published

FEW = settings(max_examples=60, deadline=None)
SECONDS = st.integers(0, 9).map(float)


def waited(passes: Sequence[tuple[float, float]], begin: float) -> float:
    """One device does `passes` (its seconds, its host's): the longest chain of waits. A chain follows the
    host up to some pass, and from its beginning or its end on the device."""
    chains = [0.0 + sum(device for device, _ in passes)]
    for k in range(len(passes)):
        host, after = (
            begin + sum(issue for _, issue in passes[:k]),
            sum(device for device, _ in passes[k + 1 :]),
        )
        chains += [host + passes[k][0] + after, host + passes[k][1] + after]
    return max(chains)


@st.composite
def streams(draw, pp: int | None = None, split: bool = False):
    """Models with hosts, and micro-batches of each."""
    stages, costs = pp or draw(st.integers(1, 5)), []
    for _ in range(draw(st.integers(1, 3))):
        rows = [draw(st.lists(SECONDS, min_size=stages, max_size=stages).map(tuple)) for _ in range(5)]
        forward, rest, weights, there, back = rows
        backward = tuple(a + b for a, b in zip(rest, weights, strict=True))
        costs.append(StageCosts(forward, backward, weights if split else (), issued=there, issued_back=back))
    return costs, [draw(st.integers(1, 6)) for _ in costs]


@FEW
@given(streams(pp=1), st.integers(-30, 30).map(float))
def test_one_device_waits_for_the_longest_chain(stream, begin: float) -> None:
    costs, counts = stream
    units = [one for one, count in zip(costs, counts, strict=True) for _ in range(count)]
    forward = [(one.forward[0], one.issued[0]) for one in units]
    assert forward_makespan(costs, counts, (begin,)) == waited(forward, begin)
    both = [
        lane
        for one in units
        for lane in ((one.forward[0], one.issued[0]), (one.backward[0], one.issued_back[0]))
    ]
    assert training_makespan(costs, counts, (begin,)) == waited(both, begin)


@FEW
@given(streams(), st.booleans(), st.integers(0, 20).map(float))
def test_hosts_cost_no_less_than_none_and_no_more_than_waiting_for_each_pass(stream, split, ahead) -> None:
    costs, counts = stream
    if split:
        costs = [replace(one, weights=tuple(0.5 * b for b in one.backward)) for one in costs]
    free = [replace(one, issued=(), issued_back=()) for one in costs]
    alone = [one.alone() for one in costs]
    begin = (-ahead,) * len(costs[0].forward)
    for makespan in (forward_makespan, training_makespan):
        least, most = makespan(free, counts), makespan(alone, counts)
        host = max(issued(costs, counts, makespan is training_makespan))
        assert max(least, host) <= makespan(costs, counts) <= most
        assert max(least, host - ahead) <= makespan(costs, counts, begin) <= makespan(costs, counts)
    assert training_least(costs, counts, begin) <= training_makespan(costs, counts, begin)


SHEET = read_calibration("h200").rates
RATES = replace(
    SHEET,
    fixed=replace(SHEET.fixed, position_s=0.0),
    products=4e14,
    memory=4e12,
    layer_host=1e-3,
    pass_host=1e-9,
    train_host=1e-9,
)


def work(trained: Sequence[str], **options: Any) -> Workload:
    parts = tuple(
        Part(replace(published(name), head="value"), Layout.even(1, 1, 1, published(name).num_layers))
        for name in trained
    )
    one = Workload(
        actor=parts[0],
        generation=parts[0].layout,
        trained=parts,
        inferred=parts,
        stepped=len(parts),
        sequences=8,
        minibatch=8,
        steps=1,
        prompt=256,
        response=256,
        microbatch=4,
    )
    return replace(one, **options)


def test_a_small_model_is_issued_while_a_large_one_computes() -> None:
    """Behind it the small one takes its device's time alone, before it its host's; together or apart."""
    small, large = "350m", "7b"

    def passes(name: str, trained: bool) -> tuple[float, float]:
        """Of all micro-batches: the device's, the host's."""
        one = work([name])
        (stages,), (count,) = pipeline_costs(one.trained, one, 8, RATES, trained)
        device = stages.forward[0] + (stages.backward[0] if trained else 0.0)
        return count * device, issued([stages], [count], trained)[0]

    assert passes(small, False)[0] < 0.5 * passes(small, False)[1], "waits for its host alone"
    assert passes(large, False)[0] > 2 * passes(large, False)[1]
    for fused in (False, True):
        ahead = inference_seconds(work([large, small], fuse_inference=fused), RATES)
        behind = inference_seconds(work([small, large], fuse_inference=fused), RATES)
        (big, _), (little, host) = passes(large, False), passes(small, False)
        assert abs(ahead - RATES.fixed.stage_s - big - little) < 1e-6
        assert abs(behind - RATES.fixed.stage_s - big - host) < 0.05 * host
    both = work([large, small])
    steps = [step_seconds(part, RATES) for part in both.trained]
    once = training_seconds(both, RATES)
    assert abs(once - sum(steps) - passes(large, True)[0] - passes(small, True)[0] - 0.01) < 1e-6
    twice = training_seconds(replace(both, steps=2), RATES)
    assert abs(twice - 2 * once + 0.01) < 1e-6, "the host is still ahead"


def test_what_is_prepared_comes_before_the_first_pass() -> None:
    """Micro-batches of all models, and after the last pass the advantages; a host that is ahead has time."""
    slow = replace(RATES, fixed=replace(RATES.fixed, prepare_s=1e-3, position_s=1e-4))
    one = work(["7b", "7b"], recursed=256)
    count = 2 * 8 // 4
    assert inference_seconds(one, slow) - inference_seconds(one, RATES) == pytest.approx(
        count * 1e-3 + 0.0256
    )
    for fused in (False, True):
        trained = replace(one, fuse_training=fused)
        late = training_seconds(trained, slow) - training_seconds(trained, RATES)
        assert late == pytest.approx(count * 1e-3)
        several = replace(trained, steps=3)
        assert training_seconds(several, slow) - training_seconds(several, RATES) == pytest.approx(late)
        assert training_bound(several, slow) <= training_seconds(several, slow)


@FEW
@given(st.permutations(["350m", "7b", "350m"]), st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_bounds_are_bounds(names, fused: bool, steps: int, microbatch: int) -> None:
    one = work(names, fuse_training=fused, steps=steps, microbatch=microbatch)
    assert training_bound(one, RATES) <= training_seconds(one, RATES) + 1e-9
