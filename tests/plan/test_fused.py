"""Several models in one stream: slots, caps, orders, optimizers beside the stream, refusals."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.check import check
from puzzle.plan.cost import CostTable
from puzzle.plan.fused import (
    StreamModel,
    fused_1f1b,
    fused_forward,
    shortened,
    stream,
    stretched,
    why_not_fused,
)
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipelines import one_f_one_b
from puzzle.plan.schedule import Op, Schedule, Work
from puzzle.plan.simulate import simulate
from tests.plan.costs import uniform
from tests.plan.interpreter import play

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
    models = [StreamModel(name, m, tied=tied) for name in NAMES]
    cost = uniform(NAMES, f, b)
    fused = fused_1f1b(models, p, order, defer=defer)
    assert simulate(fused, cost).makespan == (2 * m + p - 1) * (f + b)
    assert fused.peak_in_flight() == tuple(min(p - s, 2 * m) for s in range(p))
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
    two = fused_1f1b([StreamModel(name, m) for name in NAMES], p, split=True, defer=defer)
    for schedule, count in ((one, m), (two, 2 * m)):
        slots = count * (f + b + weight) + (p - 1) * (f + b - weight)
        assert simulate(schedule, cost).makespan == slots
        assert schedule.peak_in_flight() == (p,) * p
    plain = one_f_one_b(p, m, "actor", optimizer=True)
    assert simulate(plain, cost).makespan - simulate(one, cost).makespan == 2 * weight * (p - 1)


def test_one_stage_has_nothing_to_fill() -> None:
    assert one_f_one_b(1, 4, optimizer=True, split=True) == one_f_one_b(1, 4, optimizer=True)
    models = [StreamModel(name, 3) for name in NAMES]
    assert fused_1f1b(models, 1, split=True) == fused_1f1b(models, 1)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[StreamModel], int, list[str]]:
    p = draw(st.integers(1, 5))
    sizes = st.tuples(*[st.integers(1, 9).map(float)] * p)
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    models = [
        StreamModel(f"m{i}", n, draw(sizes), draw(st.booleans()), draw(sizes)) for i, n in enumerate(counts)
    ]
    order = draw(st.permutations([m.name for m in models for _ in range(m.microbatches)]))
    return models, p, order


@given(streams(), st.data())
def test_pipelines_with_fewer_microbatches_keep_one_order(
    case: tuple[list[StreamModel], int, list[str]], data: st.DataObject
) -> None:
    """Still right; the last backwards of all models and the optimizers' actions keep their order."""
    models, p, order = case
    counts = {m.name: data.draw(st.integers(1, m.microbatches)) for m in models}
    split = data.draw(st.booleans())
    whole = fused_1f1b(models, p, order, split=split)
    short = shortened(whole, counts)
    assert check(short) == []
    assert shortened(whole, {m.name: m.microbatches for m in models}) == whole

    def fixed(schedule: Schedule, stage: int) -> list[tuple[Op, str]]:
        last = {w.model: w.microbatches - 1 for w in schedule.work if isinstance(w, Work)}
        return [
            (a.op, a.model)
            for a in schedule.actions[stage]
            if a.microbatch < 0 or ("backward" in a.op and a.microbatch == last[a.model])
        ]

    for stage in range(p):
        assert fixed(short, stage) == fixed(whole, stage)


@given(streams(), st.floats(0, 3), st.integers(1, 4), st.integers(0, 9), st.booleans())
@settings(max_examples=300)
def test_any_stream_is_right_and_keeps_its_cap(
    case: tuple[list[StreamModel], int, list[str]],
    slack: float,
    defer: int,
    seed: int,
    split: bool,
) -> None:
    """Any order of any models, uneven stages, any cap that holds one micro-batch before and between the parts
    of its backward."""
    models, p, order = case
    held = [max(max(m.activation_bytes[s], m.deferred_bytes[s] * split) for m in models) for s in range(p)]
    cap = [most * (1 + slack) for most in held]
    schedule = fused_1f1b(models, p, order, cap_bytes=cap, defer=defer, split=split)
    weight, deferred = (
        {m.name: x for m, x in zip(models, sizes, strict=True)}
        for sizes in zip(*((m.activation_bytes, m.deferred_bytes) for m in models), strict=True)
    )
    assert check(schedule, cap, weight, deferred) == []
    assert play(schedule, seed) is None
    forwards = [a.model for a in schedule.actions[0] if a.op is Op.FORWARD]
    assert forwards == list(order)
    alone = [Counter(a.op for a in stage)[Op.STEP] for stage in schedule.actions]
    assert alone == [len(models)] * p


def test_the_cap_holds_only_as_much_as_it_says() -> None:
    models = [StreamModel("actor", 8, (4.0,) * 4), StreamModel("critic", 8, (1.0,) * 4)]
    free = fused_1f1b(models, 4, "alternating")
    weight = {m.name: m.activation_bytes for m in models}
    assert free.peak_in_flight(weight) == (10, 9, 5, 4)
    assert fused_1f1b(models, 4, "alternating", cap_bytes=[6] * 4).peak_in_flight(weight) == (6, 6, 5, 4)
    with pytest.raises(UserError, match="one micro-batch of actor holds 4 bytes on stage 2, the cap is 3"):
        fused_1f1b(models, 4, cap_bytes=[4, 4, 3, 4])


def test_the_first_optimizer_runs_beside_the_second_model() -> None:
    """With 8 micro-batches to follow, the first model's step, norm and gather cost only the step itself."""
    models = [StreamModel(name, 8) for name in NAMES]
    passes = {"forward": 1.0, "backward": 2.0, "activation": 0.0, "gradient": 0.0}
    optimizer = {"reduce": 2.0, "norm": 1.0, "step": 0.5, "gather": 6.0}
    cost = CostTable(dict.fromkeys(NAMES, passes | optimizer))
    timeline = simulate(fused_1f1b(models, 4), cost)
    slots, tail = (16 + 3) * 3.0, 2.0 + 1.0 + 0.5 + 6.0
    assert timeline.makespan == slots + 0.5 + tail
    gathers = {(s.row, s.model): s.end for s in timeline.spans if s.category == "gather"}
    ends = {s.row: s.end for s in timeline.spans if s.name == "backward critic 7"}
    assert all(gathers[s, "actor"] < ends[s] for s in range(4))


def test_orders() -> None:
    models = [StreamModel("a", 4), StreamModel("b", 2)]

    def names(order: object) -> str:
        return "".join(model for model, _ in stream(models, order))  # ty: ignore[invalid-argument-type]

    assert names("sequential") == "aaaabb"
    assert names("alternating") == "abaaba"
    assert names("babaaa") == "babaaa"
    assert stream(models, "babaaa")[:3] == [("b", 0), ("a", 0), ("b", 1)]
    with pytest.raises(UserError, match="stream order"):
        stream(models, "aaab")


@given(streams(), st.data())
def test_a_mix_for_other_counts(case: tuple[list[StreamModel], int, list[str]], data: st.DataObject) -> None:
    """As many of each as asked for; what has the same counts stays; one after the other stays so."""
    models, _, order = case
    own = {m.name: m.microbatches for m in models}
    assert stretched(order, own) == tuple(order)
    counts = {m.name: data.draw(st.integers(1, 9)) for m in models}
    assert Counter(stretched(order, counts)) == counts
    other = [StreamModel(name, n) for name, n in counts.items()]
    for kind in ("sequential", "alternating") if len(set(own.values())) == 1 else ("sequential",):
        names = [model for model, _ in stream(models, kind)]
        if kind == "sequential" or len(set(counts.values())) == 1:
            assert stretched(names, counts) == tuple(model for model, _ in stream(other, kind))


@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 9))
def test_fused_inference(p: int, counts: list[int], seed: int) -> None:
    """One stream: one fill for all models."""
    models = [StreamModel(f"m{i}", n) for i, n in enumerate(counts)]
    schedule = fused_forward(models, p)
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
