"""The checker against an interpreter that plays schedules with symbols: they judge every mutation alike."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import Action, Op, PipelineSpec, Schedule
from puzzle.plan.pipeline.decode_ring import Ring
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.plan.simulate.check import check
from tests.plan.interpreter import play
from tests.plan.single import forward_only, one_f_one_b

ACTOR, CRITIC = PipelineModel("actor", 3), PipelineModel("critic", 2, tied=True)


@st.composite
def built(draw: st.DrawFn) -> Schedule:
    p, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["train", "step", "forward", "fused", "alternating", "inference", "ring"]))
    split = draw(st.booleans())
    match kind:
        case "train" | "step":
            return one_f_one_b(p, m, optimizer=kind == "step", split=split)
        case "forward":
            return forward_only(p, m)
        case "ring":
            ring, passes = Ring(p, m, draw(st.integers(1, 3))), st.lists(st.just(1), max_size=2).map(tuple)
            return ring.unrolled(tuple(draw(st.lists(passes, min_size=1, max_size=3))))
        case "inference":
            return schedules.forward_only([ACTOR, CRITIC], p)
        case _:
            order = "alternating" if kind == "alternating" else "sequential"
            return schedules.one_f_one_b([ACTOR, CRITIC], p, order, split=split)


def mutated(schedule: Schedule, stage: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[stage] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


@given(built(), st.integers(0, 99))
def test_built_schedules_are_right(schedule: Schedule, seed: int) -> None:
    assert check(schedule) == []
    assert play(schedule, seed) is None


@given(built(), st.data())
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


@given(built(), st.data())
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


OPTIMIZER = [Op.REDUCE, Op.WAIT_REDUCE, Op.NORM, Op.WAIT_NORM, Op.STEP, Op.GATHER, Op.WAIT_GATHER]


@pytest.mark.parametrize("split", [False, True])
def test_every_optimizer_action_waits_for_all_before_it(split: bool) -> None:
    """Each one brought forward in front of each that it needs, and of each backward pass."""
    schedule = one_f_one_b(2, 2, optimizer=True, split=split)
    for stage, actions in enumerate(schedule.actions):
        for later, op in enumerate(OPTIMIZER):
            action = Action(op, "actor")
            rest = [a for a in actions if a != action]
            backwards = [a for a in rest if a.op in (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)]
            for needed in [*backwards, *(Action(o, "actor") for o in OPTIMIZER[:later])]:
                place = rest.index(needed)
                found = check(mutated(schedule, stage, [*rest[:place], action, *rest[place:]]))
                assert f"stage {stage}: {action.label} comes before {needed.label}" in found


@pytest.mark.parametrize("op", [Op.FORWARD, Op.BACKWARD])
def test_no_pass_comes_after_its_optimizer_step(op: Op) -> None:
    """Not even where another model's may, and a step of another model forbids nothing."""
    schedule = schedules.one_f_one_b([ACTOR, CRITIC], 1)
    actions = [a for a in schedule.actions[0] if a != Action(op, "actor", 2)]
    place = actions.index(Action(Op.STEP, "actor")) + 1
    found = check(mutated(schedule, 0, [*actions[:place], Action(op, "actor", 2), *actions[place:]]))
    assert f"stage 0: {op} actor 2 comes after the optimizer step" in found
    assert not any("critic" in line and "after the optimizer step" in line for line in found)
    alone = one_f_one_b(1, 2, optimizer=True).actions[0]
    doubled = replace(schedule, actions=((*schedule.actions[0], Action(Op.STEP, "actor")),))
    assert check(doubled) == ["stage 0: step actor comes twice"]
    assert check(mutated(schedule, 0, [*schedule.actions[0], alone[0]])) != []


def test_all_stages_sum_norms_in_one_order() -> None:
    """Two models, whose norms one stage alone exchanges: sums of different models would meet."""
    schedule = schedules.one_f_one_b([ACTOR, CRITIC], 3)
    block = {name: [Action(op, name) for op in OPTIMIZER] for name in ("actor", "critic")}

    def ordered(stage: int, names: list[str]) -> tuple[Action, ...]:
        passes = [a for a in schedule.actions[stage] if a.op not in OPTIMIZER]
        return (*passes, *(a for name in names for a in block[name]))

    both = ["actor", "critic"]
    same = replace(schedule, actions=tuple(ordered(s, both) for s in range(3)))
    assert check(same) == []
    for odd in range(3):
        lists = tuple(ordered(s, both[::-1] if s == odd else both) for s in range(3))
        found = check(replace(schedule, actions=lists))
        orders = [both[::-1] if s == odd else both for s in range(3)]
        assert f"the stages sum norms in different orders: {orders}" in found


def test_backwards_keep_the_order_of_microbatches() -> None:
    """Sums of gradients are the same bits in every stream because each adds up in one order."""
    schedule = one_f_one_b(1, 3)
    actions = list(schedule.actions[0])
    forwards, backwards = [a for a in actions if a.op is Op.FORWARD], [Op.BACKWARD] * 3
    swapped = [*forwards, *(Action(op, "actor", m) for op, m in zip(backwards, (0, 2, 1), strict=True))]
    assert check(mutated(schedule, 0, swapped)) == ["stage 0: backward actor 2 comes before backward actor 1"]
    right = [*forwards[::-1], *(Action(Op.BACKWARD, "actor", m) for m in range(3))]
    assert check(mutated(schedule, 0, right)) == []  # forwards may come in any order


def test_transfers_in_the_wrong_place_are_named() -> None:
    schedule = one_f_one_b(2, 2)
    first, last = (list(actions) for actions in schedule.actions)

    def moved(actions: list[Action], label: str, before: str) -> list[Action]:
        action = next(a for a in actions if a.label == label)
        rest = [a for a in actions if a != action]
        place = next(i for i, a in enumerate(rest) if a.label == before)
        return [*rest[:place], action, *rest[place:]]

    send, wait = "send actor 0 activation to 1", "wait_send actor 0 activation to 1"
    assert f"stage 0: {send} comes before the pass that yields it" in check(
        mutated(schedule, 0, moved(first, send, "forward actor 0"))
    )
    assert f"stage 0: {wait} comes before the send" in check(mutated(schedule, 0, moved(first, wait, send)))
    recv, got = "recv actor 1 activation from 0", "wait_recv actor 1 activation from 0"
    assert f"stage 1: {got} comes before the receive" in check(mutated(schedule, 1, moved(last, got, recv)))
    assert f"stage 1: forward actor 1 comes before {got}" in check(
        mutated(schedule, 1, moved(last, "forward actor 1", got))
    )
    lost = [a for a in first if a.label != wait]
    assert f"stage 0: nobody waits for {send}" in check(mutated(schedule, 0, lost))
    silent = [a for a in first if a.label not in (send, wait)]
    assert any(
        line.startswith("stage 0: nobody sends Message") for line in check(mutated(schedule, 0, silent))
    )
    crossed = check(mutated(schedule, 1, moved(last, recv, "recv actor 0 activation from 0")))
    (line,) = [line for line in crossed if "is sent as" in line]  # the first difference of a channel alone
    assert "transfer 0 is sent as" in line
    assert "and received as" in line


@pytest.mark.parametrize(
    ("prefills", "decode", "words"),
    [
        (((2, 2),), (4,), []),
        (((2, 0),), (4,), ["prefill micro-batches of (2, 0) sequences"]),
        (((2,), (-1,)), (4,), ["prefill micro-batches of (2, -1) sequences"]),
        (((2, 2),), (0,), ["decode micro-batches of (0,) sequences"]),
        (((2, 2),), (), ["a ring without decode micro-batches"]),
    ],
)
def test_micro_batches_of_a_generation_have_sequences(
    prefills: tuple, decode: tuple, words: list[str]
) -> None:
    ring = Ring(1, 4, 4).unrolled(((2, 2),))
    # Behind a model that is only asked, which has no such thing.
    specs = (PipelineSpec("critic", 1), replace(ring.specs[0], prefills=prefills, decode=decode))
    lists = ((Action(Op.FORWARD, "critic", 0), *ring.actions[0]),)
    assert check(replace(ring, actions=lists, specs=specs)) == words


def test_specs() -> None:
    schedule = forward_only(1, 2)
    assert check(replace(schedule, specs=(PipelineSpec("actor", 3),))) == [
        "stage 0: forward actor 2 is missing"
    ]
    assert check(replace(schedule, specs=(PipelineSpec("actor", 1),))) == [
        "stage 0: forward actor 1 is in no spec"
    ]
    assert "two specs" in check(replace(schedule, specs=schedule.specs * 2))[0]
    ring = Ring(2, 4, 2).unrolled(((1,),))
    none = replace(ring.specs[0], decode=())
    assert "without decode micro-batches" in check(replace(ring, specs=(none,)))[0]
