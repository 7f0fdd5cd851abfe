"""Memory by the ranks that tell, as a search has it, against every rank and the switch as it is planned."""

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import RankMemory, Switched, Use, Work, rank_memory
from puzzle.plan.predict.footprints import (
    generation_footprint,
    telling_stages,
    together,
    training_footprint,
)
from puzzle.plan.predict.job import Choice, Job
from puzzle.plan.predict.search import sizes
from puzzle.plan.reshard.plan import plan_switch
from puzzle.spec.model import ModelSpec
from tests.plan.jobs import cut, job, workload

SEQUENCES = 64
SPEC = ModelSpec("llama", 64, 512, 1024, 8, 8, 4, 64)


@dataclass(frozen=True)
class Case:
    """A job, a choice of it, and what its ranks are told beside: parts of sums, None where they are fast."""

    job: Job
    choice: Choice
    parts: int | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, vocab = draw(st.sampled_from([8, 16])), draw(st.sampled_from([500, 4096]))
    spec = ModelSpec(
        draw(st.sampled_from(["llama", "qwen2"])),
        vocab,
        draw(st.sampled_from([64, 256])),
        draw(st.sampled_from([64, 1024])),
        draw(st.sampled_from([8, 12])),
        heads,
        draw(st.sampled_from([2, 8])),
        16,
    )
    ranks, deep = draw(st.sampled_from([2, 4, 8, 64])), draw(st.booleans())
    laid = sorted(sizes(ranks, 8, spec, SEQUENCES // 2))
    longest = [one for one in laid if one[1] >= 8] if deep else []
    training, generation = draw(st.sampled_from(longest or laid)), draw(st.sampled_from(laid))
    numerics = draw(st.sampled_from(["fast", "largest tp", "parts"]))
    largest = max(training[0], generation[0])
    parts = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n % largest == 0]))
    prompt, response = draw(st.sampled_from([8, 300])), draw(st.sampled_from([1, 500]))
    of = job(
        spec,
        workload(spec, SEQUENCES, prompt, response),
        offload_reference=draw(st.booleans()),
        ranks=ranks,
        itemsize=draw(st.sampled_from([2, 4])),
        fused=draw(st.booleans()),
        invariant=numerics != "fast",
        numerics_parts=parts if numerics == "parts" else None,
        keep=draw(st.booleans()),
    )
    how = "split" if longest else draw(st.sampled_from(["", "split", "recompute"]))
    choice = Choice(
        training,
        generation,
        draw(st.sampled_from([1, 2, 4])),
        fuse_training=bool(longest) or draw(st.booleans()),
        split=how == "split",
        recompute=how == "recompute",
        offload=draw(st.booleans()),
        decode=draw(st.sampled_from([None, 1, 16])),
        slots=draw(st.sampled_from([None, 2, 16])),
    )
    told = {"fast": None, "largest tp": largest, "parts": parts}[numerics]
    return Case(of, choice, told)


def every_rank(case: Case, keep: bool) -> list[RankMemory]:
    """By a formula of each rank, with the switch as it is planned; `keep`: what graphs read stays."""
    of, choice, spec = case.job, case.choice, case.job.actor.spec
    source, wanted = (Placement.default(cut(spec, laid)) for laid in (choice.training, choice.generation))
    uses = [
        Use(
            role.name,
            role.spec,
            source,
            of.itemsize,
            role.trained,
            recompute=role.trained and choice.recompute,
            fused=of.fused,
            offload=choice.offload if role.trained else role.offload,
            split=role.trained and choice.split,
            parts=case.parts,
        )
        for role in of.roles
    ]
    work = Work(
        SEQUENCES,
        SEQUENCES // 2,
        of.work.prompt,
        of.work.response,
        choice.microbatch,
        None,
        choice.decode,
        most=choice.slots,
    )
    switched = [Switched()] * of.ranks
    if choice.training != choice.generation:
        plan = plan_switch(spec, source, wanted, Cluster(8), itemsize=of.itemsize, staging_bytes=of.staging)
        wanted = plan.destination
        ranks = [plan.for_rank(rank) for rank in range(of.ranks)]
        weights = [of.itemsize * sum(param.size for param in rank.allocate) for rank in ranks]
        switched = [Switched(w, max(w, rank.peak_extra)) for w, rank in zip(weights, ranks, strict=True)]
    generation = Use("generation", spec, wanted, of.itemsize, fused=of.fused, parts=case.parts)
    return [
        rank_memory(rank, uses, generation, work, switched[rank], choice.fuse_training, keep=keep)
        for rank in range(of.ranks)
    ]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_memory_of_telling_ranks_is_that_of_the_worst(case: Case) -> None:
    """Exact in training and where nothing is switched; else the planned switch lies between both bounds."""
    low, choice = case.job, case.choice
    high, spec = replace(low, exact=False), low.actor.spec
    ranks, without = every_rank(case, low.keep), every_rank(case, keep=False)
    peak = max(rank.peak for rank in ranks)
    held = training_footprint(low, choice)
    parts = low.parts(choice.training, choice.generation)
    adds = generation_footprint(low, cut(spec, choice.generation), choice.decode, choice.slots, parts)
    assert held.peak == max(max(rank.total("training"), rank.total("inference")) for rank in without)
    if choice.training == choice.generation:
        assert together(low, held, adds) == together(high, held, adds) == peak
    else:
        norms = 2 * spec.num_layers * 2 * low.itemsize * spec.hidden_size  # whole on every tensor rank
        assert together(low, held, adds) <= peak + norms
        assert peak <= together(high, held, adds) + norms


@settings(max_examples=600, deadline=None)
@given(
    st.integers(1, 16).flatmap(
        lambda pp: st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=pp, max_size=pp)
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 4]),
    st.sampled_from([None, 4]),
    st.sampled_from([64, 512]),
)
def test_telling_stages_tell(
    kinds: list[int], split: bool, fused: bool, size: int, tp: int, parts: int | None, width: int
) -> None:
    """Of stages whose layers grow fewer between the ends one of these needs the most, and one holds the
    least; where parts of split backwards keep more than whole ones, as with tensor parallelism, it may be a
    late one, and where models share a pipeline one between."""
    kinds = [*kinds[:1], *sorted(kinds[1:-1]), *kinds[1:][-1:]]
    uses = []
    for name, head, hidden, layers in (
        ("actor", "lm", 512, (3, 2, 1)),
        ("critic", "value", width, (2, 1, 1)),
    ):
        own = tuple(layers[kind] for kind in kinds)
        spec = replace(SPEC, num_layers=sum(own), head=head, hidden_size=hidden)
        placement = Placement.default(Layout(tp, len(own), 1, own))
        uses.append(Use(name, spec, placement, 2, True, split=split, parts=parts))
    layouts = [use.placement.layout for use in uses]
    ranks = [
        rank_memory(p * tp, uses, uses[0], Work(16, 16, 64, 32, size), Switched(), fused)
        for p in range(len(kinds))
    ]
    telling = [ranks[p] for p in telling_stages(layouts, [16 // size] * 2 if split and fused else ())]
    assert max(one.total("training") for one in telling) == max(one.total("training") for one in ranks)
    held = [sum(one.resident.values()) for one in ranks]
    assert min(sum(one.resident.values()) for one in telling) == min(held)
