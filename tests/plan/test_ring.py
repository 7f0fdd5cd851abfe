"""The decode ring: every token once, in step with its keys and values, for any shape; parts that add up."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import Op
from puzzle.plan.pipeline.decode_ring import Ring, ring_channels
from puzzle.plan.simulate.check import check
from puzzle.plan.simulate.simulate import simulate
from tests.plan.costs import uniform
from tests.plan.interpreter import play
from tests.plan.measures import channels

sizes = st.integers(1, 9)
rings = st.builds(Ring, st.integers(1, 6), sizes, sizes, sizes)


@given(rings, st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=200)
def test_every_token_once(ring: Ring, rounds: int, seed: int) -> None:
    """The interpreter demands that step t of a sequence reads its token t - 1 and t keys and values on every
    stage, and that the first stage ends with all tokens."""
    schedule = ring.unrolled(rounds)
    assert check(schedule) == []
    assert play(schedule, seed) is None


@given(rings, st.integers(0, 4))
def test_parts_add_up(ring: Ring, rounds: int) -> None:
    parts = [ring.prefill(), *(ring.round(step) for step in range(1, rounds + 1)), ring.drain(rounds)]
    joined = tuple(sum((part.actions[s] for part in parts), ()) for s in range(ring.num_stages))
    assert joined == ring.unrolled(rounds).actions


def test_tokens_go_straight_to_the_first_stage() -> None:
    schedule = Ring(4, 8, 1, 2).unrolled(3)
    tokens = [c for c in channels(schedule) if c.payload == "tokens"]
    assert [(c.src, c.dst) for c in tokens] == [(3, 0)]
    assert all(len([c for c in channels(schedule) if s in (c.src, c.dst)]) <= 2 for s in range(4))
    assert channels(Ring(1, 8, 1, 2).unrolled(3)) == ()
    assert all(set(ring_channels(p)) == set(channels(Ring(p, 8, 1, 2).unrolled(3))) for p in range(1, 6))


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 12))
def test_closed_form(p: int, microbatches: int, rounds: int) -> None:
    """A round takes max(P, micro-batches) slots: without bubbles once there are as many micro-batches as
    stages. Here a prefill micro-batch holds as many sequences as a decode micro-batch and takes as long."""
    ring = Ring(p, 3 * microbatches, 3, 3)
    timeline = simulate(ring.unrolled(rounds), uniform(["actor"], prefill=1, decode=1))
    full = max(p, microbatches) * (rounds - 1) + microbatches + p - 1 if rounds else 0
    assert timeline.makespan == (max(p, microbatches) if rounds else microbatches + p - 1) + full


def test_first_tokens_wait_for_the_prefills_they_need() -> None:
    """Prefill micro-batches of 2 and decode micro-batches of 3 of 7 sequences: 0-1 2-3 4-5 6 and 0-2 3-5
    6."""
    last = [a for a in Ring(2, 7, 2, 3).unrolled(0).actions[1] if a.op in (Op.PREFILL, Op.SEND)]
    assert [(a.op.value, a.microbatch) for a in last] == [
        ("prefill", 0),
        ("prefill", 1),
        ("send", 0),
        ("prefill", 2),
        ("send", 1),
        ("prefill", 3),
        ("send", 2),
    ]


def test_impossible_numbers() -> None:
    least: dict[str, Any] = {"num_stages": 1, "batch": 1, "prefill_mb": 1, "decode_mb": 1}
    assert Ring(**least).decode_microbatches == 1
    for name in least:
        with pytest.raises(UserError, match=f"{name} of at least 1, not 0"):
            replace(Ring(**least), **{name: 0})
