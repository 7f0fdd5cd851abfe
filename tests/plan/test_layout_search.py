"""Searching layouts: against every choice, against exact memory, and what more devices' means may change."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.costs import Fixed
from puzzle.plan.predict.footprints import generation_footprint, together, training_footprint
from puzzle.plan.predict.iteration import predict
from puzzle.plan.predict.job import IDEAS, Choice, Job, Sizes
from puzzle.plan.predict.rates import NAMES
from puzzle.plan.predict.search import predicted, search, sizes
from puzzle.spec.model import ModelSpec
from tests.plan import jobs
from tests.plan.jobs import cut

SPEC = ModelSpec("llama", 2048, 512, 1024, 8, 8, 4, 64)
VALUE = replace(SPEC, head="value")
RATES = replace(
    read_calibration("h200").rates, products=1e13, memory=1e11, fixed=Fixed(host_s_per_byte=1e-10)
)


def job(ranks: int = 4, memory: int = 1 << 40, exact: bool = True, sequences: int = 16) -> Job:
    work = jobs.workload(SPEC, sequences, 64, 32, graphs=True)
    return jobs.job(SPEC, work, ranks=ranks, memory=memory, exact=exact)


def every_choice(of: Job) -> Iterator[Choice]:
    """By nested loops, those without effect too."""
    laid = [
        (tp, pp, of.ranks // tp // pp)
        for tp, pp in itertools.product((1, 2, 4), (1, 2, 4))
        if of.ranks % (tp * pp) == 0
    ]
    flags = [(s, r, f, i, o) for s, r, f, i, o in itertools.product((False, True), repeat=5) if not (s and r)]
    for train, generate, size in itertools.product(laid, laid, (1, 2, 4, 8)):
        rows = -(-of.work.sequences // generate[2])
        decodes = {None, *(-(-rows // n) for n in (1, generate[1] // 2, 2 * generate[1]) if n)}
        if size > -(-of.work.minibatch // train[2]):
            continue
        for decode, (split, recompute, fuse, infer, offload) in itertools.product(decodes, flags):
            yield Choice(train, generate, size, fuse, infer, split, recompute, offload, decode)
        for slots in (-(-rows // 2), -(-rows // 4), -(-rows // 8)):
            yield Choice(train, generate, size, slots=slots)


def memory_of(of: Job, choice: Choice) -> int:
    parts = of.parts(choice.training, choice.generation)
    layout = cut(of.actor.spec, choice.generation)
    added = generation_footprint(of, layout, choice.decode, choice.slots, parts)
    return together(of, training_footprint(of, choice), added)


def brute_force(of: Job) -> dict[tuple[Sizes, Sizes], float]:
    """The least seconds of each pair of layouts, by what fits."""
    found: dict[tuple[Sizes, Sizes], float] = {}
    for choice in every_choice(of):
        if memory_of(of, choice) <= of.memory:
            pair = (choice.training, choice.generation)
            found[pair] = min(found.get(pair, 1e9), predicted(of, choice, RATES).total)
    return found


@pytest.mark.parametrize(
    ("memory", "numerics"),
    [
        (1 << 40, {}),
        (400 << 20, {}),
        (404 << 20, {"invariant": True}),
        (425 << 20, {"invariant": True, "numerics_parts": 8}),
    ],
)
def test_the_best_of_all_choices_are_found(memory: int, numerics: dict[str, Any]) -> None:
    fast, of = job(2, memory), replace(job(2, memory), **numerics)
    best = sorted(brute_force(of).values())
    found = search(of, RATES, 5)
    assert len(best) > 0
    assert len(found.plans) == min(5, len(best))
    assert [plan.seconds.total for plan in found.plans] == pytest.approx(best[:5], rel=0.006)
    for plan in found.plans:
        assert plan.seconds == predicted(of, plan.choice, RATES)
        assert plan.memory == memory_of(of, plan.choice) <= memory
    if numerics:  # there is too little room for what fast ones have found
        assert [plan.seconds for plan in search(fast, RATES, 5).plans] != [p.seconds for p in found.plans]


def test_training_cuts_its_sums_as_generation_does() -> None:
    """Where heads' gradients take most, more of them are held if generation has more tensor ranks."""
    of, narrow = job(4, exact=False), replace(SPEC, intermediate_size=64, num_layers=4)
    roles = tuple(replace(role, spec=replace(narrow, head=role.spec.head)) for role in of.roles)
    work = replace(of.work, prompt=2, response=1000)
    of = replace(of, roles=roles, work=work, invariant=True)
    plans = [plan for plan in search(of, RATES, 100).plans if plan.choice.training[0] == 1]
    more = [plan for plan in plans if plan.choice.generation[0] > 1]
    assert all(plan.memory == memory_of(of, plan.choice) for plan in plans)
    alone = [replace(plan.choice, generation=plan.choice.training) for plan in more]
    assert any(
        training_footprint(of, plan.choice).peak > training_footprint(of, choice).peak
        for plan, choice in zip(more, alone, strict=True)
    )


def test_parts_of_sums_are_whole_on_every_tensor_rank() -> None:
    """Layouts that the configuration would refuse are no plans."""
    of = replace(job(4), invariant=True, numerics_parts=2)
    plans = search(of, RATES, 100).plans
    laid = {sizes for plan in plans for sizes in (plan.choice.training, plan.choice.generation)}
    assert {tp for tp, _, _ in laid} == {1, 2}
    largest = replace(of, numerics_parts=None)
    assert [tp for tp in range(1, 17) if largest.allows((tp, 1, 1))] == [1, 2, 4, 8]
    assert largest.parts((1, 4, 1), (4, 1, 1)) == 4
    assert of.parts((1, 4, 1), (2, 2, 1)) == 2
    assert job(4).parts((4, 1, 1)) is None


@pytest.mark.parametrize("idea", IDEAS)
def test_what_no_plan_shall_have_none_has(idea: str) -> None:
    """Leaving it out is never faster."""
    for memory in (1 << 40, 400 << 20):
        of = job(4, memory)
        found = search(replace(of, without=frozenset({idea})), RATES, 100).plans
        assert found
        for plan in found:
            choice = plan.choice
            has = {
                "switch": choice.training != choice.generation,
                "fusion": choice.fuse_training or choice.fuse_inference,
                "split": choice.split,
                "recompute": choice.recompute,
                "offload": choice.offload,
            }
            assert not has[idea]
        assert found[0].seconds.total >= search(of, RATES, 1).plans[0].seconds.total * 0.994


def test_nothing_that_fits_is_said() -> None:
    with pytest.raises(UserError, match=r"no plan fits 0\.0 GiB per device; training takes 0\.2 GiB at the"):
        search(job(4, 1 << 20), RATES, 3)
    with pytest.raises(UserError, match="--gpus 13: no layout of so many processes"):
        search(job(13), RATES, 3)


def test_layouts_are_all_that_a_model_can_have() -> None:
    found = set(sizes(8, 4, SPEC, 4))
    assert found == {(1, 2, 4), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1)}


choices = st.builds(
    lambda train, generate, size, fuse, which, offload: Choice(
        train, generate, size, fuse, False, which == 1, which == 2, offload
    ),
    st.sampled_from([(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]),
    st.sampled_from([(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(0, 2),
    st.booleans(),
)


RICHER = ("products", "memory", "bus", "message")


@settings(max_examples=60, deadline=None)
@given(choices, st.sampled_from(NAMES), st.floats(1.05, 4))
def test_better_links_and_devices_never_slow_a_plan(choice: Choice, name: str, times: float) -> None:
    """And smaller constants of all that is no rate neither."""
    of, value = job(), getattr(RATES, name)
    better = replace(RATES, **{name: value * times if name in RICHER else value / times})
    before, after = (vars(predicted(of, choice, rates)) for rates in (RATES, better))
    assert all(after[stage] <= before[stage] * (1 + 1e-12) for stage in before)


@pytest.mark.parametrize("exact", [True, False])
def test_more_memory_never_shrinks_what_fits(exact: bool) -> None:
    fitting: list[set[tuple[Sizes, Sizes]]] = []
    best = []
    for memory in (200, 215, 230, 250, 300, 400, 1000):
        try:
            found = search(job(4, memory << 20, exact), RATES, 100).plans
        except UserError:
            found = []
        fitting.append({(plan.choice.training, plan.choice.generation) for plan in found})
        best.append(found[0].seconds.total if found else 1e9)
    assert all(a <= b for a, b in itertools.pairwise(fitting))
    assert 0 < len(fitting[0]) < len(fitting[-1])
    assert all(a >= b * 0.994 for a, b in itertools.pairwise(best))


def test_queues_make_room() -> None:
    """Where the cache of all sequences is too large, fewer are generated at a time, which takes longer."""
    of = job(1, sequences=256)
    of = replace(of, work=replace(of.work, response=1000), without=frozenset(IDEAS))
    whole = search(of, RATES, 1).plans[0]
    assert whole.choice.slots is None
    least = Choice((1, 1, 1), (1, 1, 1), 1)
    all_at_once = generation_footprint(of, cut(SPEC, least.generation), None)
    memory = together(of, training_footprint(of, least), all_at_once) - (60 << 20)
    tight = search(replace(of, memory=memory), RATES, 1).plans[0]
    assert tight.choice.slots in (128, 64, 32)
    assert tight.memory <= memory
    assert tight.seconds.generation > whole.seconds.generation
    assert tight.seconds == predicted(of, tight.choice, RATES)


def test_offloading_is_paid_for_by_its_bytes() -> None:
    of, choice = job(), Choice((1, 2, 2), (1, 2, 2), 2)
    plain, away = (predicted(of, replace(choice, offload=o), RATES) for o in (False, True))
    held = (SPEC.parameters + VALUE.parameters) / 4
    assert away.training - plain.training == pytest.approx(2 * 12 * held * 1e-10)
    assert replace(away, training=plain.training) == plain


def test_alike_plans_are_the_simplest() -> None:
    """With a single stage there is nothing to fuse, to split or to fill."""
    free = replace(RATES, message=1e15, bus=1e15, hop=1e-9, small=1e-9, fixed=Fixed())
    for plan in search(job(1), free, 3).plans:
        assert plan.choice.complexity == 0
    work = predict(job(1).work, free)
    assert work.switch == 0
