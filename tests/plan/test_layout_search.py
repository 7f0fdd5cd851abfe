"""Searching layouts: against every choice, against exact memory, and what more devices' means may change."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import Switched, Use, Work, rank_memory
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.costs import Fixed
from puzzle.plan.predict.footprints import (
    generation_footprint,
    telling_stages,
    together,
    training_footprint,
    uses_of,
)
from puzzle.plan.predict.iteration import Part, Workload, predict
from puzzle.plan.predict.job import IDEAS, Choice, Job, Role, Sizes
from puzzle.plan.predict.rates import NAMES
from puzzle.plan.predict.search import predicted, search, sizes
from puzzle.plan.reshard.plan import plan_switch
from puzzle.spec.model import ModelSpec

SPEC = ModelSpec("llama", 2048, 512, 1024, 8, 8, 4, 64)
VALUE = replace(SPEC, head="value")
RATES = replace(
    read_calibration("h200").rates, products=1e13, memory=1e11, fixed=Fixed(host_s_per_byte=1e-10)
)


def cut(spec: ModelSpec, laid: Sizes) -> Layout:
    return Layout.even(*laid, spec.num_layers)


def job(ranks: int = 4, memory: int = 1 << 40, exact: bool = True, sequences: int = 16) -> Job:
    part = Part(SPEC, cut(SPEC, (1, 1, 1)))
    work = Workload(
        actor=part,
        generation=part.layout,
        trained=(part,),
        inferred=(part,),
        stepped=2,
        sequences=sequences,
        minibatch=sequences // 2,
        steps=2,
        prompt=64,
        response=32,
        microbatch=None,
        graphs=True,
    )
    return Job(
        roles=(
            Role("actor", SPEC, True),
            Role("critic", VALUE, True),
            Role("reference", SPEC, False),
            Role("reward", VALUE, False),
        ),
        trained=("actor", "critic"),
        inferred=("reference", "critic", "reward"),
        work=work,
        layout=cut,
        ranks=ranks,
        per_node=8,
        memory=memory,
        itemsize=2,
        fused=True,
        compiled=False,
        staging=1 << 16,
        exact=exact,
    )


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


def brute_force(of: Job) -> dict[tuple[Sizes, Sizes], float]:
    """The least seconds of each pair of layouts, by what fits."""
    found: dict[tuple[Sizes, Sizes], float] = {}
    for choice in every_choice(of):
        footprint = generation_footprint(of, cut(SPEC, choice.generation), choice.decode, choice.slots)
        if together(of, training_footprint(of, choice), footprint) <= of.memory:
            pair = (choice.training, choice.generation)
            found[pair] = min(found.get(pair, 1e9), predicted(of, choice, RATES).total)
    return found


@pytest.mark.parametrize("memory", [1 << 40, 400 << 20])
def test_the_best_of_all_choices_are_found(memory: int) -> None:
    of = job(2, memory)
    best = sorted(brute_force(of).values())
    found = search(of, RATES, 5)
    assert len(best) > 0
    assert len(found.plans) == min(5, len(best))
    assert [plan.seconds.total for plan in found.plans] == pytest.approx(best[:5], rel=0.006)
    for plan in found.plans:
        assert plan.seconds == predicted(of, plan.choice, RATES)
        assert plan.memory <= memory


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


def exact_peaks(of: Job, choice: Choice, staging: int) -> tuple[int, int]:
    """Of the rank that needs most: in training and inference, and in all stages with the planned switch."""
    uses = uses_of(of, choice)
    source = uses[0].placement
    work = Work(of.work.sequences, of.work.minibatch, 64, 32, choice.microbatch, None, choice.decode)
    destination, switched = source, [Switched()] * of.ranks
    if choice.training != choice.generation:
        wanted = Placement.default(cut(SPEC, choice.generation))
        plan = plan_switch(SPEC, source, wanted, Cluster(8), itemsize=2, staging_bytes=staging)
        destination = plan.destination
        parts = [plan.for_rank(rank) for rank in range(of.ranks)]
        weights = [2 * sum(param.size for param in part.allocate) for part in parts]
        switched = [Switched(w, max(w, part.peak_extra)) for w, part in zip(weights, parts, strict=True)]
    generation = Use("generation", SPEC, destination, 2, fused=True)
    ranks = [
        rank_memory(rank, uses, generation, work, switched[rank], choice.fuse_training)
        for rank in range(of.ranks)
    ]
    trained = max(max(one.total("training"), one.total("inference")) for one in ranks)
    return trained, max(one.peak for one in ranks)


@settings(max_examples=60, deadline=None)
@given(choices)
def test_memory_of_telling_ranks_is_that_of_the_worst(choice: Choice) -> None:
    """Exact in training and where nothing is switched; else the planned switch lies between both bounds."""
    low, high = job(exact=True), job(exact=False)
    footprint = training_footprint(low, choice)
    adds = generation_footprint(low, cut(SPEC, choice.generation), choice.decode)
    trained, peak = exact_peaks(low, choice, low.staging)
    assert footprint.peak == trained
    if choice.training == choice.generation:
        assert together(low, footprint, adds) == together(high, footprint, adds) == peak
    else:
        least = together(low, footprint, adds)
        norms = 2 * SPEC.num_layers * 2 * 2 * SPEC.hidden_size  # whole on every tensor rank
        assert least <= peak + norms
        assert peak <= together(high, footprint, adds) + norms


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 4]),
)
def test_telling_stages_tell(layers: list[int], split: bool, size: int, tp: int) -> None:
    """Of stages of any layers one of these needs the most, and one holds the least; where parts of split
    backwards keep more than whole ones, as with tensor parallelism, it may be a late one."""
    spec = replace(SPEC, num_layers=sum(layers), vocab_size=64)
    layout = Layout(tp, len(layers), 1, tuple(layers))
    uses = [Use("actor", spec, Placement.default(layout), 2, True, split=split)]
    ranks = [
        rank_memory(p * tp, uses, uses[0], Work(16, 16, 64, 32, size), Switched(), False)
        for p in range(layout.pp)
    ]
    telling = [ranks[p] for p in telling_stages(layout)]
    assert max(one.total("training") for one in telling) == max(one.total("training") for one in ranks)
    held = [sum(one.resident.values()) for one in ranks]
    assert min(sum(one.resident.values()) for one in telling) == min(held)


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
