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
rings = st.builds(Ring, st.integers(1, 6), sizes, sizes)
joins = st.lists(st.lists(sizes, max_size=3).map(tuple), min_size=1, max_size=5).map(tuple)


@given(rings, joins, st.integers(0, 99))
@settings(max_examples=200)
def test_every_token_once(ring: Ring, prefills: tuple, seed: int) -> None:
    """The interpreter demands that step t of a micro-batch reads its tokens of step t - 1, the keys and
    values of all steps before and of all that has joined by then on every stage, that nobody prefills before
    it is known whose rows are free, and that the first stage ends with all tokens."""
    schedule = ring.unrolled(prefills)
    assert check(schedule) == []
    assert play(schedule, seed) is None


@given(rings, joins)
def test_parts_add_up(ring: Ring, prefills: tuple) -> None:
    parts, number = [], 0
    for step, before in enumerate(prefills, 1):
        parts += [ring.prefill(number, len(before)), ring.round(step)]
        number += len(before)
    parts.append(ring.drain(len(prefills)))
    joined = tuple(sum((part.actions[s] for part in parts), ()) for s in range(ring.num_stages))
    assert joined == ring.unrolled(prefills).actions


@given(rings, joins.filter(any), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_a_prefill_in_another_place_is_found(ring: Ring, prefills: tuple, random: Any) -> None:
    """A prefill pass that comes before the round that frees its rows, or after the one that it joins."""
    schedule = ring.unrolled(prefills)
    stage = random.randrange(ring.num_stages)
    actions = list(schedule.actions[stage])
    places = [i for i, action in enumerate(actions) if action.op is Op.PREFILL]
    moved = actions.pop(random.choice(places))
    decodes = [i for i, action in enumerate(actions) if action.op is Op.DECODE]
    step = next(t for t in range(len(prefills)) if sum(map(len, prefills[: t + 1])) > moved.microbatch)
    right = step * ring.decode_microbatches
    place = random.choice([n for n in range(len(decodes) + 1) if n != right])
    actions.insert(decodes[place] if place < len(decodes) else len(actions), moved)
    lists = tuple(tuple(actions) if s == stage else own for s, own in enumerate(schedule.actions))
    assert check(replace(schedule, actions=lists)) != []


def test_tokens_go_straight_to_the_first_stage() -> None:
    three = ((1,) * 8, (), (1,))
    schedule = Ring(4, 8, 2).unrolled(three)
    tokens = [c for c in channels(schedule) if c.payload == "tokens"]
    assert [(c.src, c.dst) for c in tokens] == [(3, 0)]
    assert all(len([c for c in channels(schedule) if s in (c.src, c.dst)]) <= 2 for s in range(4))
    assert channels(Ring(1, 8, 2).unrolled(three)) == ()
    assert all(set(ring_channels(p)) == set(channels(Ring(p, 8, 2).unrolled(three))) for p in range(1, 6))


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 12))
def test_closed_form(p: int, microbatches: int, rounds: int) -> None:
    """A round takes max(P, micro-batches) slots: without bubbles once there are as many micro-batches as
    stages. A prefill pass takes as long as a decode pass here, and no stage waits between the two."""
    ring = Ring(p, 3 * microbatches, 3)
    prefills = ((3,) * microbatches, *[()] * (rounds - 1)) if rounds else ()
    timeline = simulate(ring.unrolled(prefills), uniform(["actor"], prefill=1, decode=1))
    full = microbatches + max(p, microbatches) * (rounds - 1) + microbatches + p - 1 if rounds else 0
    assert timeline.makespan == full


def test_impossible_numbers() -> None:
    least: dict[str, Any] = {"num_stages": 1, "rows": 1, "decode_mb": 1}
    assert Ring(**least).decode_microbatches == 1
    for name in least:
        with pytest.raises(UserError, match=f"{name} of at least 1, not 0"):
            replace(Ring(**least), **{name: 0})
