"""Several models in one pipeline: slots, orders, optimizers beside other models, refusals."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import Action, Op, PipelineSpec, Schedule
from puzzle.plan.pipeline.schedules import (
    PipelineModel,
    microbatch_order,
    pipeline_channels,
    stretched,
    why_not_fused,
)
from puzzle.plan.simulate.check import check
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import simulate
from tests.plan.costs import uniform
from tests.plan.interpreter import play
from tests.plan.measures import channels, peak_in_flight
from tests.plan.single import forward_only, one_f_one_b

NAMES = ("actor", "critic")
costs = st.integers(1, 4)


@given(
    st.integers(1, 7),
    st.integers(1, 9),
    costs,
    costs,
    st.sampled_from(["sequential", "alternating"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_slots(p: int, m: int, f: int, b: int, order: str, defer: int, tied: bool) -> None:
    """2M + P - 1 slots of forward and backward, although every optimizer action is in; apart 2(M + P - 1)."""
    models = [PipelineModel(name, m, tied=tied) for name in NAMES]
    cost = uniform(NAMES, f, b)
    fused = schedules.one_f_one_b(models, p, order, defer=defer)
    assert simulate(fused, cost).makespan == (2 * m + p - 1) * (f + b)
    assert peak_in_flight(fused) == tuple(min(p - s, 2 * m) for s in range(p))
    apart = sum(simulate(one_f_one_b(p, m, name, optimizer=True), cost).makespan for name in NAMES)
    assert apart == 2 * (m + p - 1) * (f + b)


@given(st.integers(2, 6), st.integers(1, 9), st.integers(1, 3), costs, st.integers(0, 3), st.integers(0, 3))
def test_slots_of_split_backwards(p: int, n: int, defer: int, weight: int, more_f: int, more_b: int) -> None:
    """Of what 1F1B idles, 2 w (P - 1) are filled, in one model as in a stream of two, and every stage holds
    no more than the first one does anyway (Qi et al. 2024, table 2, ZB-H1)."""
    m, f, b = n + p - 1, weight + more_f, weight + more_b
    parts = {"backward_input": b, "backward_weight": weight}
    cost = uniform(NAMES, f, b + weight, **parts)
    one = one_f_one_b(p, m, "actor", optimizer=True, split=True)
    two = schedules.one_f_one_b([PipelineModel(name, m) for name in NAMES], p, split=True, defer=defer)
    for schedule, count in ((one, m), (two, 2 * m)):
        slots = count * (f + b + weight) + (p - 1) * (f + b - weight)
        assert simulate(schedule, cost).makespan == slots
        assert peak_in_flight(schedule) == (p,) * p
    plain = one_f_one_b(p, m, "actor", optimizer=True)
    assert simulate(plain, cost).makespan - simulate(one, cost).makespan == 2 * weight * (p - 1)


def test_one_stage_has_nothing_to_fill() -> None:
    assert one_f_one_b(1, 4, optimizer=True, split=True) == one_f_one_b(1, 4, optimizer=True)
    models = [PipelineModel(name, 3) for name in NAMES]
    assert schedules.one_f_one_b(models, 1, split=True) == schedules.one_f_one_b(models, 1)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[PipelineModel], int, list[str]]:
    p = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    models = [PipelineModel(f"m{i}", n, draw(st.booleans())) for i, n in enumerate(counts)]
    order = draw(st.permutations([m.name for m in models for _ in range(m.microbatches)]))
    return models, p, order


def for_replica(models: list[PipelineModel], counts: dict[str, int]) -> list[PipelineModel]:
    return [replace(m, own=counts[m.name]) for m in models]


@given(pipelines(), st.data())
def test_pipelines_with_fewer_microbatches_keep_one_order(
    case: tuple[list[PipelineModel], int, list[str]], data: st.DataObject
) -> None:
    """Still right; the last backwards of all models and the optimizers' actions keep their order."""
    models, p, order = case
    counts = {m.name: data.draw(st.integers(1, m.microbatches)) for m in models}
    split = data.draw(st.booleans())
    whole = schedules.one_f_one_b(models, p, order, split=split)
    short = schedules.one_f_one_b(for_replica(models, counts), p, order, split=split)
    assert check(short) == []
    everything = for_replica(models, {m.name: m.microbatches for m in models})
    assert schedules.one_f_one_b(everything, p, order, split=split) == whole

    def fixed(schedule: Schedule, stage: int) -> list[tuple[Op, str]]:
        last = {w.model: w.microbatches - 1 for w in schedule.specs if isinstance(w, PipelineSpec)}
        return [
            (a.op, a.model)
            for a in schedule.actions[stage]
            if a.microbatch < 0 or ("backward" in a.op and a.microbatch == last[a.model])
        ]

    for stage in range(p):
        assert fixed(short, stage) == fixed(whole, stage)


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_a_replica_with_fewer_runs_one_model_as_if_all_had_as_many(
    p: int, most: int, data: st.DataObject
) -> None:
    """One model needs no agreement between pipelines: receives are as early as anywhere."""
    own = data.draw(st.integers(1, most))
    optimizer, split, tied = (data.draw(st.booleans()) for _ in range(3))
    models = [PipelineModel("actor", most, tied, own)]
    short = schedules.one_f_one_b(models, p, optimizer=optimizer, split=split)
    assert short == one_f_one_b(p, own, optimizer=optimizer, tied=tied, split=split)
    assert schedules.forward_only(models, p) == forward_only(p, own)


def test_a_replica_without_microbatches_has_nothing_to_run_and_cannot_train() -> None:
    models = [PipelineModel("a", 2, own=0), PipelineModel("b", 3, own=1)]
    schedule = schedules.forward_only(models, 3)
    assert check(schedule) == []
    assert schedule.counts()["forward"] == 3
    assert schedules.forward_only(models[:1], 3).actions == ((), (), ())
    with pytest.raises(ValueError, match="needs a micro-batch of every model"):
        schedules.one_f_one_b(models, 3)
    with pytest.raises(ValueError, match="at most as many micro-batches"):
        schedules.forward_only([PipelineModel("a", 2, own=3)], 3)


@pytest.mark.parametrize("p", range(1, 5))
def test_channels_are_known_beforehand(p: int) -> None:
    assert pipeline_channels(p, backward=True) == channels(one_f_one_b(p, 2))
    assert pipeline_channels(p, backward=False) == channels(forward_only(p, 2))


@given(pipelines(), st.integers(1, 4), st.integers(0, 9), st.booleans())
@settings(max_examples=300)
def test_any_order_is_right_and_holds_no_more_than_1f1b(
    case: tuple[list[PipelineModel], int, list[str]], defer: int, seed: int, split: bool
) -> None:
    models, p, order = case
    schedule = schedules.one_f_one_b(models, p, order, defer=defer, split=split)
    assert check(schedule) == []
    assert play(schedule, seed) is None
    assert all(held <= (p if split else p - s) for s, held in enumerate(peak_in_flight(schedule)))
    forwards = [a.model for a in schedule.actions[0] if a.op is Op.FORWARD]
    assert forwards == list(order)
    alone = [Counter(a.op for a in stage)[Op.STEP] for stage in schedule.actions]
    assert alone == [len(models)] * p


def test_the_first_optimizer_runs_beside_the_second_model() -> None:
    """With 8 micro-batches to follow, the first model's step, norm and gather cost only the step itself."""
    models = [PipelineModel(name, 8) for name in NAMES]
    passes = {"forward": 1.0, "backward": 2.0, "activation": 0.0, "gradient": 0.0}
    optimizer = {"reduce": 2.0, "norm": 1.0, "step": 0.5, "gather": 6.0}
    cost = CostTable(dict.fromkeys(NAMES, passes | optimizer))
    timeline = simulate(schedules.one_f_one_b(models, 4), cost)
    slots, tail = (16 + 3) * 3.0, 2.0 + 1.0 + 0.5 + 6.0
    assert timeline.makespan == slots + 0.5 + tail
    gathers = {(s.row, s.model): s.end for s in timeline.spans if s.category == "gather"}
    ends = {s.row: s.end for s in timeline.spans if s.name == "backward critic 7"}
    assert all(gathers[s, "actor"] < ends[s] for s in range(4))


@pytest.mark.parametrize(
    ("tied", "split", "places"),
    [
        # The actor's backwards are units 0 to 2, the critic's 3 to 10. By stage: after which unit's backward
        # the actor reduces, sums norms and steps.
        ("", False, [(2, 3, 4), (2, 3, 5), (2, 3, 6)]),
        ("critic", False, [(2, 3, 4), (2, 3, 5), (2, 3, 6)]),
        # The last stage gets its sum only once the first one has reduced, two units later.
        ("actor", False, [(2, 3, 6), (2, 3, 6), (2, 5, 6)]),
        # Stage s has the weights' gradients s units later; norms are summed where all have them.
        ("", True, [(2, 5, 6), (3, 5, 7), (4, 5, 8)]),
        ("actor", True, [(2, 5, 8), (3, 5, 8), (4, 7, 8)]),
    ],
)
def test_an_optimizer_acts_where_what_it_needs_has_just_come(
    tied: str, split: bool, places: list[tuple[int, int, int]]
) -> None:
    models = [PipelineModel("actor", 3, tied == "actor"), PipelineModel("critic", 8, tied == "critic")]
    schedule = schedules.one_f_one_b(models, 3, split=split)
    backward = Op.BACKWARD_INPUT if split else Op.BACKWARD
    gradients = Op.BACKWARD_WEIGHT if split else Op.BACKWARD

    def unit(passes: list[Action], op: Op, model: str) -> int:
        return sum(a.op is backward for a in passes[: passes.index(Action(op, model))]) - 1

    for actions, place in zip(schedule.actions, places, strict=True):
        passes = [a for a in actions if a.peer is None]
        assert tuple(unit(passes, op, "actor") for op in (Op.REDUCE, Op.NORM, Op.STEP)) == place
        assert passes[passes.index(Action(Op.REDUCE, "actor")) - 1] == Action(gradients, "actor", 2)
        assert [unit(passes, op, "critic") for op in (Op.REDUCE, Op.NORM, Op.STEP)] == [10] * 3


@pytest.mark.parametrize("split", [False, True])
def test_a_reduction_waits_for_no_other_model(split: bool) -> None:
    """It starts right after its last gradient, before the stage may be held up by another's sums."""
    models = [PipelineModel("actor", 3), PipelineModel("critic", 1)]
    gradients = Op.BACKWARD_WEIGHT if split else Op.BACKWARD
    for actions in schedules.one_f_one_b(models, 3, split=split).actions:
        acts = [a for a in actions if a.peer is None]
        assert acts[acts.index(Action(Op.REDUCE, "critic")) - 1] in (
            Action(gradients, "critic", 0),
            Action(Op.REDUCE, "actor"),  # of a split backward both may end here
        )


def test_orders() -> None:
    models = [PipelineModel("a", 4), PipelineModel("b", 2)]

    def names(order: object) -> str:
        return "".join(model for model, _ in microbatch_order(models, order))  # ty: ignore[invalid-argument-type]

    assert names("sequential") == "aaaabb"
    assert names("alternating") == "abaaba"
    assert names("babaaa") == "babaaa"
    assert microbatch_order(models, "babaaa")[:3] == [("b", 0), ("a", 0), ("b", 1)]
    with pytest.raises(UserError, match="the order has"):
        microbatch_order(models, "aaab")


@given(pipelines(), st.data())
@settings(max_examples=400)
def test_a_mix_for_other_counts(
    case: tuple[list[PipelineModel], int, list[str]], data: st.DataObject
) -> None:
    """As many of each as asked for; what has the same counts stays; one after the other stays so."""
    models, _, order = case
    own = {m.name: m.microbatches for m in models}
    assert stretched(order, own) == tuple(order)
    counts = {m.name: data.draw(st.integers(1, 9)) for m in models}
    assert Counter(stretched(order, counts)) == counts
    other = [PipelineModel(name, n) for name, n in counts.items()]
    # One micro-batch of each alternates and is sequential: nothing says which. From twice as many on, a
    # micro-batch's place is shared, and what alternated makes small blocks.
    told = len(set(own.values())) == 1 and max(own.values()) > 1
    told &= max(counts.values()) < 2 * max(own.values())
    for kind in ("sequential", "alternating") if told else ("sequential",):
        names = [model for model, _ in microbatch_order(models, kind)]
        if kind == "sequential" or len(set(counts.values())) == 1:
            assert stretched(names, counts) == tuple(model for model, _ in microbatch_order(other, kind))


@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 9))
def test_fused_inference(p: int, counts: list[int], seed: int) -> None:
    """One stream: one fill for all models."""
    models = [PipelineModel(f"m{i}", n) for i, n in enumerate(counts)]
    schedule = schedules.forward_only(models, p)
    assert check(schedule) == []
    assert play(schedule, seed) is None
    timeline = simulate(schedule, uniform([m.name for m in models]))
    assert timeline.makespan == sum(counts) + p - 1


def test_refusals() -> None:
    actor = Placement.default(Layout.even(2, 2, 1, 8))
    critic = Placement.default(Layout.even(1, 2, 2, 4))
    assert why_not_fused({"actor": actor, "critic": critic}) is None
    deep = Placement.default(Layout.even(1, 4, 1, 4))
    assert why_not_fused({"actor": actor, "critic": deep}) == "actor has pp=2 and critic has pp=4"
    swapped = replace(critic, ranks=(0, 2, 1, 3))
    assert (
        why_not_fused({"actor": actor, "critic": swapped})
        == "stage 0 of actor and of critic are different ranks"
    )
    crossed = replace(critic, ranks=(0, 1, 3, 2))
    assert (
        why_not_fused({"actor": actor, "critic": crossed})
        == "the pipelines of actor and of critic join different ranks"
    )
