"""Schedule values: identity, counts, flushes, memory, the shape of 1F1B."""

import pickle
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import COLLECTIVES, Action, Channel, Op, Payload, Schedule
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.plan.simulate.check import check
from tests.plan.measures import channels, peak_in_flight
from tests.plan.single import forward_only, one_f_one_b

WAITS = (Op.WAIT_REDUCE, Op.WAIT_NORM, Op.WAIT_GATHER)


def test_1f1b_passes_of_three_stages() -> None:
    """By hand: warm up, then one backward and one forward in turn, then the rest of the backwards."""
    want = ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    ops = {Op.FORWARD: "F", Op.BACKWARD: "B"}
    for stage, passes in zip(one_f_one_b(3, 4).actions, want, strict=True):
        assert " ".join(f"{ops[a.op]}{a.microbatch}" for a in stage if a.op in ops) == passes


def test_actions_of_no_micro_batch_have_number_minus_one() -> None:
    acts = [a for stage in one_f_one_b(2, 3, optimizer=True).actions for a in stage]
    assert {a.microbatch for a in acts if a.op in COLLECTIVES or a.op in (Op.STEP, *WAITS)} == {-1}
    assert {a.microbatch for a in acts if a.op in (Op.FORWARD, Op.BACKWARD)} == {0, 1, 2}
    assert Action(Op.STEP, "actor").label == "step actor"


def test_receives_are_started_one_pass_early() -> None:
    """On the last stage the hidden states of micro-batch 1 travel while micro-batch 0 goes backward."""
    labels = [a.label for a in one_f_one_b(2, 2).actions[1]]
    assert labels == [
        "recv actor 0 activation from 0",
        "wait_recv actor 0 activation from 0",
        "forward actor 0",
        "recv actor 1 activation from 0",
        "backward actor 0",
        "send actor 0 gradient to 0",
        "wait_recv actor 1 activation from 0",
        "forward actor 1",
        "backward actor 1",
        "wait_send actor 0 gradient to 0",
        "send actor 1 gradient to 0",
        "wait_send actor 1 gradient to 0",
    ]


@given(st.integers(1, 6), st.integers(1, 9))
def test_1f1b_keeps_its_cap(num_stages: int, microbatches: int) -> None:
    schedule = one_f_one_b(num_stages, microbatches)
    caps = [min(num_stages - s, microbatches) for s in range(num_stages)]
    assert peak_in_flight(schedule) == tuple(caps)
    assert check(schedule) == []


def test_counts_channels_and_flushes() -> None:
    schedule = one_f_one_b(3, 4)
    assert schedule.counts()["forward"] == schedule.counts()["backward"] == 12
    assert schedule.counts()["send"] == schedule.counts()["wait_recv"] == 16
    hops = [(0, 1, "activation"), (1, 0, "gradient"), (1, 2, "activation"), (2, 1, "gradient")]
    assert channels(schedule) == tuple(Channel(a, b, Payload(p)) for a, b, p in hops)
    assert schedule.flushes == forward_only(3, 4).flushes == one_f_one_b(1, 4).flushes == 1
    pair = [PipelineModel("actor", 2), PipelineModel("critic", 2)]
    fused = schedules.one_f_one_b(pair, 3)
    assert fused.flushes == 1
    ops = (Op.FORWARD, Op.BACKWARD)
    turns = tuple(Action(op, name, m) for name in ("actor", "critic") for m in range(2) for op in ops)
    assert replace(fused, actions=(turns, *fused.actions[1:])).flushes == 4


def test_the_hash_is_of_the_behaviour() -> None:
    schedule = one_f_one_b(2, 3)
    assert schedule.hash == replace(one_f_one_b(2, 3), name="another").hash
    assert schedule.hash == pickle.loads(pickle.dumps(schedule)).hash
    others = [
        one_f_one_b(2, 4),
        one_f_one_b(2, 3, "critic"),
        forward_only(2, 3),
    ]
    assert len({schedule.hash, *(s.hash for s in others)}) == 4
    # Logs of different runs are compared by it, so it must not change between versions.
    assert forward_only(1, 1).hash == sha256(b'[[["forward","actor",0,null,null,0]]]').hexdigest()
    assert len(repr(schedule)) < 100


def test_impossible_numbers() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        one_f_one_b(2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        forward_only(0, 2)
    with pytest.raises(ValueError, match="1 action lists for 2 stages"):
        Schedule("x", 2, ((),))
    with pytest.raises(ValueError, match="no transfer"):
        Action(Op.FORWARD, "actor", 0).message(0)
    with pytest.raises(ValueError, match="no transfer"):
        replace(Action(Op.SEND, "actor", 0), payload=Payload.TOKENS).message(0)
