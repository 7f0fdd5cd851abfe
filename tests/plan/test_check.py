"""The checker against an interpreter that plays schedules with symbols: they judge every mutation alike."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.check import check
from puzzle.plan.fused import StreamModel, fused_1f1b, fused_forward
from puzzle.plan.pipelines import forward_only, one_f_one_b
from puzzle.plan.ring import Ring
from puzzle.plan.schedule import Action, Op, Schedule, Work
from tests.plan.interpreter import play

ACTOR, CRITIC = StreamModel("actor", 3), StreamModel("critic", 2, tied=True)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    p, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["train", "step", "forward", "fused", "alternating", "inference", "ring"]))
    split = draw(st.booleans())
    match kind:
        case "train" | "step":
            return one_f_one_b(p, m, optimizer=kind == "step", split=split)
        case "forward":
            return forward_only(p, m)
        case "ring":
            ring = Ring(p, m, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
            return ring.unrolled(draw(st.integers(0, 3)))
        case "inference":
            return fused_forward([ACTOR, CRITIC], p)
        case _:
            order = "alternating" if kind == "alternating" else "sequential"
            return fused_1f1b([ACTOR, CRITIC], p, order, split=split)


def mutated(schedule: Schedule, stage: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[stage] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


@given(schedules(), st.integers(0, 99))
def test_built_schedules_are_right(schedule: Schedule, seed: int) -> None:
    assert check(schedule) == []
    assert play(schedule, seed) is None


@given(schedules(), st.data())
@settings(max_examples=300)
def test_moved_actions_are_judged_as_the_interpreter_does(schedule: Schedule, data: st.DataObject) -> None:
    """Some moves are harmless (a receive posted earlier): no fault is missed, none invented."""
    stage = data.draw(st.integers(0, schedule.num_stages - 1))
    actions = list(schedule.actions[stage])
    place = st.integers(0, len(actions) - 1)
    i, j = data.draw(place), data.draw(place)
    if data.draw(st.booleans()):
        actions[i], actions[j] = actions[j], actions[i]
    else:
        actions.insert(j, actions.pop(i))
    changed = mutated(schedule, stage, actions)
    found, truth = check(changed), play(changed)
    assert bool(found) == bool(truth), (found, truth)


@given(schedules(), st.data())
@settings(max_examples=300)
def test_lost_doubled_and_altered_actions_are_found(schedule: Schedule, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, schedule.num_stages - 1))
    actions = list(schedule.actions[stage])
    i = data.draw(st.integers(0, len(actions) - 1))
    action = actions[i]
    kind = data.draw(st.sampled_from(["drop", "double", "microbatch", "peer", "model", "op"]))
    match kind:
        case "drop":
            del actions[i]
        case "double":
            actions.insert(data.draw(st.integers(0, len(actions))), action)
        case "microbatch":
            actions[i] = replace(
                action, microbatch=action.microbatch + data.draw(st.sampled_from([-1, 1, 9]))
            )
        case "peer":
            wrong = {None, -1, *range(schedule.num_stages + 1)} - {action.peer}
            actions[i] = replace(action, peer=data.draw(st.sampled_from(sorted(wrong, key=str))))
        case "model":
            actions[i] = replace(action, model="another")
        case "op":
            actions[i] = replace(
                action, op=data.draw(st.sampled_from([op for op in Op if op is not action.op]))
            )
    assert check(mutated(schedule, stage, actions)) != []


@pytest.mark.parametrize("payload", ["activation", "gradient"])
def test_a_transfer_forgotten_on_both_sides_is_found(payload: str) -> None:
    schedule = one_f_one_b(3, 4)
    lists = tuple(
        tuple(a for a in stage if not (a.payload == payload and a.microbatch == 2))
        for stage in schedule.actions
    )
    assert any("wait_recv" in line for line in check(replace(schedule, actions=lists)))


def test_sends_that_wait_for_each_other_deadlock() -> None:
    """Two stages that each wait for their send before they start to receive."""

    def blocking(stage: tuple[Action, ...]) -> tuple[Action, ...]:
        out: list[Action] = []
        for action in stage:
            if action.op is Op.SEND:
                out += [action, replace(action, op=Op.WAIT_SEND)]
            elif action.op is Op.WAIT_RECV:
                out += [replace(action, op=Op.RECV), action]
            elif action.op not in (Op.WAIT_SEND, Op.RECV):
                out.append(action)
        return tuple(out)

    schedule = one_f_one_b(2, 4)
    stuck = replace(schedule, actions=tuple(blocking(stage) for stage in schedule.actions))
    assert play(stuck) is not None
    found = check(stuck)
    assert found
    assert all(line.startswith("deadlock: stage ") for line in found)


def test_caps() -> None:
    schedule = one_f_one_b(4, 8)
    assert check(schedule, cap=[4, 3, 2, 1]) == []
    assert check(schedule, cap=[4, 2, 2, 1]) == ["stage 1 holds 3 activations, its cap is 2"]
    weight = {"actor": [10.0, 10, 10, 20]}
    assert check(schedule, cap=[40, 30, 20, 20], weight=weight) == []
    assert check(schedule, cap=[40, 30, 20, 10], weight=weight) == [
        "stage 3 holds 20 activations, its cap is 10"
    ]


def test_both_parts_of_a_split_backward_are_owed() -> None:
    schedule = one_f_one_b(2, 2, optimizer=True, split=True)
    last = Action(Op.BACKWARD_WEIGHT, "actor", 1)

    def without(kept: int) -> list[str]:
        """Of the last stage's last part, moved `kept` places behind the reduction."""
        actions = [a for a in schedule.actions[1] if a != last]
        if kept:
            actions.insert(actions.index(Action(Op.REDUCE, "actor")) + kept, last)
        return check(mutated(schedule, 1, actions))

    assert "stage 1: backward_weight actor 1 is missing" in without(0)
    assert without(1) == ["stage 1: reduce actor comes before backward_weight actor 1"]


def test_promises() -> None:
    schedule = forward_only(1, 2)
    assert check(replace(schedule, work=(Work("actor", 3),))) == ["stage 0: forward actor 2 is missing"]
    assert check(replace(schedule, work=(Work("actor", 1),))) == ["stage 0: forward actor 1 was not promised"]
    assert "promised twice" in check(replace(schedule, work=schedule.work * 2))[0]
    ring = Ring(2, 4, 2, 2).unrolled(1)
    holes = replace(ring.work[0], decode=((0, 2), (3, 4)))
    assert "do not cut the batch" in check(replace(ring, work=(holes,)))[0]
