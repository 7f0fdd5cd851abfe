"""Device bytes of every rank, from shapes alone: what always lies there, and what each stage adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from puzzle.plan.activations import FP32, Activations, Use, storages, worst
from puzzle.plan.layout import Coord, Layout
from puzzle.plan.pages import (
    KEPT_FREE,
    PAGE,
    PREFILL_TOKENS,
    Cache,
    kv_bytes,
    wanted_pages,
    whole_pages,
)
from puzzle.plan.pipeline.schedules import in_flight
from puzzle.spec.model import ModelSpec

BUCKET = 1 << 26
"""Gradients that are reduced together at most, unless one parameter alone has more (`engine.train`)."""
EXCHANGES = 2
"""Buckets that replicas exchange at a time under invariant numerics."""


@dataclass(frozen=True)
class Work:
    """What one iteration runs, for full-length sequences. Counts are of sequences over all replicas, but for
    `microbatch`, `prefill` and `decode`, which are sequences of one pass (None: no limit, or for the latter
    two an even share per stage). `microbatch_tokens` limits passes by tokens instead: many short sequences
    may fill one. `samples` sequences have a prompt in common; a replica generates at most `most` at a time
    (None: all), and prefills at most `prefill_tokens` in a pass."""

    batch: int
    minibatch: int
    prompt: int
    response: int
    microbatch: int | None = None
    prefill: int | None = None
    decode: int | None = None
    microbatch_tokens: int | None = None
    samples: int = 1
    most: int | None = None
    prefill_tokens: int = PREFILL_TOKENS

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by term: `resident` ones always, a stage's in it. `host`: what is offloaded or kept
    there; `cache` is that of the stage `generation`."""

    rank: int
    resident: Mapping[str, int]
    stages: Mapping[str, Mapping[str, int]]
    host: int = 0
    cache: Cache | None = None

    def total(self, stage: str) -> int:
        """Resident bytes and those of a stage."""
        return sum(self.resident.values()) + sum(self.stages[stage].values())

    @property
    def worst(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the worst stage."""
        return self.total(self.worst)

    @property
    def largest(self) -> tuple[str, int]:
        """The largest term at the peak."""
        terms = {**self.resident, **self.stages[self.worst]}
        return max(terms.items(), key=lambda term: term[1])


def weight_bytes(spec: ModelSpec, layout: Layout, coord: Coord, itemsize: int) -> int:
    """The storages of a coordinate, vocabulary padding included."""
    return itemsize * sum(rows * size for rows, size in storages(spec, layout, coord.p))


def merged_bytes(use: Use, coord: Coord) -> int:
    """The matrices that have adapters, which the host keeps while these are merged."""
    if not use.merged:
        return 0
    matrices = storages(use.spec, use.placement.layout, coord.p, "adapted")
    return use.itemsize * sum(rows * size for rows, size in matrices)


def state_bytes(use: Use, coord: Coord) -> dict[str, int]:
    """ZeRO-1: moments, and fp32 masters where weights are not fp32, of the replica's own trained rows."""
    dp, own = use.placement.layout.dp, 0
    for rows, size in storages(use.spec, use.placement.layout, coord.p, "trained"):
        chunk = -(-rows // dp)
        own += size * max(0, min(chunk, rows - coord.d * chunk))
    return {"moments": 2 * FP32 * own, "masters": 0 if use.itemsize == FP32 else FP32 * own}


def gradient_bytes(use: Use, coord: Coord) -> int:
    """fp32 buffers of all replicas' trained rows; apart from them the own rows' sum, if gloo adds up.

    Stepped rows spread in the same memory.
    """
    dp = use.placement.layout.dp
    return FP32 * _chunk(use, coord) * (dp if use.fused or dp == 1 or use.parts else dp + 1)


def exchanged_bytes(use: Use, coord: Coord) -> int:
    """What replicas exchange of their gradients to add them in one order, and half a bucket's first sums."""
    layout = use.placement.layout
    if layout.dp == 1 or not use.parts:
        return 0
    chunks = [-(-rows // layout.dp) * size for rows, size in storages(use.spec, layout, coord.p, "trained")]
    total, most = layout.dp * sum(chunks), max(BUCKET, layout.dp * max(chunks))
    bucket = min(total, most)
    return FP32 * (min(total, EXCHANGES * bucket) + bucket // 2)


def deferred_gather_bytes(use: Use, coord: Coord) -> int:
    """All replicas' stepped rows, where they spread after the gradients' buffers were given back."""
    dp = use.placement.layout.dp
    return use.itemsize * _chunk(use, coord) * dp if dp > 1 else 0


def _chunk(use: Use, coord: Coord) -> int:
    layout = use.placement.layout
    trained = storages(use.spec, layout, coord.p, "trained")
    return sum(-(-rows // layout.dp) * size for rows, size in trained)


def _limited(rows: int, limit: int | None) -> int:
    return max(1, min(rows, limit or rows))


def largest_pass(use: Use, work: Work, p: int, sequences: int) -> tuple[Activations, int]:
    """The largest pass over a replica's share of `sequences`, and how many such it takes at most.

    A replica has ceil(sequences / dp) of them however they are given out. Where tokens are the limit, short
    prompts leave nearly all of a pass to responses.
    """
    rows = -(-sequences // use.placement.layout.dp)
    if work.microbatch_tokens is None:
        size = _limited(rows, work.microbatch)
        return Activations(use, p, size * work.length, size * work.response), -(-rows // size)
    most = rows * work.length
    tokens = min(max(work.microbatch_tokens, work.length), most)
    return Activations(use, p, tokens, min(tokens, rows * work.response)), -(-most // tokens)


def _microbatches(use: Use, work: Work, p: int) -> tuple[Activations, int]:
    """One of those of an optimizer step, and how many there are."""
    return largest_pass(use, work, p, work.minibatch)


def _training(use: Use, work: Work, p: int) -> dict[str, int]:
    """Activations under 1F1B; then logits, and after them one layer's gradients."""
    one, count = _microbatches(use, work, p)
    held = one.held(*in_flight(use.placement.layout.pp, p, count, split=True))
    exchanged = exchanged_bytes(use, Coord(0, p, 0))
    return {"activations": held, "exchanged gradients": exchanged, **one.passing()}


def _fused(uses: Sequence[Use], work: Work, rank: int) -> dict[str, int]:
    """The same of models in one pipeline, whatever the order: the largest micro-batches are all that a stage
    keeps."""
    terms: dict[str, int] = {}
    passing: list[dict[str, int]] = []
    coords = [use.placement.coord_of(rank) for use in uses]
    left, waiting = uses[0].placement.layout.pp - coords[0].p, coords[0].p
    found = [(use, *_microbatches(use, work, coord.p)) for use, coord in zip(uses, coords, strict=True)]
    for use, one, count in sorted(found, key=lambda item: -item[1].saved()):
        held = min(left, count)
        later = min(waiting, count)
        left, waiting = left - held, waiting - later
        terms[f"{use.name} activations"] = one.held(held, later)
        terms[f"{use.name} exchanged gradients"] = exchanged_bytes(use, coords[0])
        passing.append(_named(use, one.passing()))
    return terms | worst(passing)


def _passing(use: Use, work: Work, p: int) -> dict[str, int]:
    """A pass without gradients."""
    one, _ = largest_pass(use, work, p, work.batch)
    return worst([{"one layer": one.forward()}, {"logits": one.logits()}])


def generation_passes(use: Use, p: int, tokens: int, rows: int, cached: int = 0) -> dict[str, int]:
    """The larger of a prefill pass of `tokens` tokens and, later, the logits of a decode pass of `rows` rows.

    A sequence of `cached` tokens is cached in parts: a part's keys and values stand behind a copy of those
    before it, one layer at a time.

    Without a kernel, a draw holds about four tensors of logits' shape: logits, noise, their sum,
    probabilities.
    """
    one = Activations(use, p, tokens, 0)
    logits = (1 if use.fused else 4) * FP32 * rows * one.rows
    copied = 2 * cached * one.kv_heads * use.spec.head_dim * use.itemsize
    return worst([{"one layer": one.forward() + copied}, {"logits": logits if one.last else 0}])


def graph_bytes(use: Use, p: int, rows: int) -> int:
    """What the graphs of decode passes of up to `rows` rows compute in: they share it, one after another."""
    return sum(generation_passes(use, p, rows, rows).values())


def _generation(use: Use, work: Work, p: int, pages: int | None = None) -> tuple[dict[str, int], Cache, int]:
    """The cache of the sequences that a replica generates at a time, and passes over them; bytes of their
    graphs. Passes take an even share per stage where no limit is given.

    With `pages` the cache has no more than so many: a sequence may be put back, and is then prefilled with
    its own tokens.
    """
    layout, page = use.placement.layout, PAGE if use.fused else work.length - 1
    count = -(-work.batch // layout.dp)
    rows = _limited(count, work.most)
    columns = whole_pages(work.prompt, work.response, page)
    alike = layout.dp == 1 or count % work.samples == 0
    prompts = -(-count // work.samples) if alike else -(-(count - 1) // work.samples) + 1
    samples = [count // prompts + (i < count % prompts) for i in range(prompts)]
    wanted = wanted_pages([(work.prompt, n) for n in samples], work.response, page, rows)
    held = wanted if pages is None else max(columns, min(pages, wanted))
    longest = work.prompt if held == wanted else work.length
    limit = work.prefill_tokens
    size = min(_limited(prompts, work.prefill or -(-prompts // layout.pp)), max(1, limit // longest))
    decode = _limited(rows, work.decode or -(-rows // layout.pp))
    cache = Cache(held + 1, kv_bytes(use.spec, layout, p, page, use.itemsize), rows, columns)
    cached = longest if longest > limit else 0
    passes = generation_passes(use, p, min(longest * size, limit), decode, cached)
    return {"kv cache": cache.pages * cache.page_bytes, **passes}, cache, graph_bytes(use, p, decode)


@dataclass(frozen=True)
class Switched:
    """What generating in another layout takes beside the training weights: `weights` while it generates,
    `filling` (those and staging) while they are brought there; `deferred_gather`: stepped rows of the actor
    that come from other replicas while it generates."""

    weights: int = 0
    filling: int = 0
    deferred_gather: int = 0


def rank_memory(
    rank: int,
    uses: Sequence[Use],
    generation: Use | None,
    work: Work,
    switched: Switched,
    fused: bool,
    pages: int | None = None,
    keep: bool = False,
) -> RankMemory:
    """What `rank` needs. `generation` is the actor where it generates, None where nothing does; `fused`: the
    trained models share a pipeline; the cache has at most `pages` pages (None: for all at full length). With
    `keep`, what generation's graphs read stays in all stages."""
    resident, training, states, lent = _held_by(rank, uses)
    trained = [use for use in uses if use.trained]
    steps = [_fused(trained, work, rank)] if fused else []
    if not fused:
        steps += [_named(use, _training(use, work, use.placement.coord_of(rank).p)) for use in trained]
    inferred = worst([_named(use, _passing(use, work, use.placement.coord_of(rank).p)) for use in uses])
    stages = {"inference": {**lent, **inferred}, "training": {**states, **training, **worst(steps)}}
    cache = None
    if generation is not None:
        terms, cache, graphs = _generation(generation, work, generation.placement.coord_of(rank).p, pages)
        made = _named(generation, terms)
        if keep:
            cache = replace(cache, kept=True)
            weights, graph = {"generation weights": switched.weights}, {"generation graphs": graphs}
            kept = graph | {"generation kv cache": cache.pages * cache.page_bytes}
            stages = {stage: {**stages[stage], **weights, **kept} for stage in stages}
        else:
            graph = kept = {}
        stages = {
            # Offloaded states leave when the weights are there.
            "switch": {"generation weights and staging": switched.filling, **states, **kept},
            "generation": {
                "generation weights": switched.weights,
                "actor deferred all-gather": switched.deferred_gather,
                **made,
                **graph,
            },
            **stages,
        }
    merged = sum(merged_bytes(use, use.placement.coord_of(rank)) for use in uses)
    return RankMemory(rank, resident, stages, sum(states.values()) + sum(lent.values()) + merged, cache)


def fitting_pages(ranks: Sequence[RankMemory], limit: int) -> int:
    """Pages beside `NOBODY`'s that every rank has room for in `limit` bytes while it generates, with the
    passes of sequences that are put back."""
    found = []
    for rank in ranks:
        assert rank.cache is not None
        others = rank.total("generation") - rank.cache.pages * rank.cache.page_bytes
        found.append(int((1 - KEPT_FREE) * limit - others) // rank.cache.page_bytes - 1)
    return max(0, min(found))


def kind_of_rank(rank: int, uses: Sequence[Use], generation: Use | None) -> tuple[int, ...]:
    """Ranks of one kind need the same bytes, if the switch brings them as much: they differ in t alone, or in
    the replica of models that hold no optimizer states."""
    coords = [(use.trained, use.placement.coord_of(rank)) for use in uses]
    trained = [(coord.p, coord.d if trained else 0) for trained, coord in coords]
    stage = () if generation is None else (generation.placement.coord_of(rank).p,)
    return (*(number for pair in trained for number in pair), *stage)


def _held_by(rank: int, uses: Sequence[Use]) -> tuple[dict[str, int], ...]:
    """Bytes of all models by term: those always held, gradients, offloaded states, offloaded weights."""
    resident: dict[str, int] = {}
    gradients: dict[str, int] = {}
    states: dict[str, int] = {}
    lent: dict[str, int] = {}
    for use in uses:
        coord = use.placement.coord_of(rank)
        weights = weight_bytes(use.spec, use.placement.layout, coord, use.itemsize)
        weights = 0 if use.borrowed else weights
        (lent if use.offload and not use.trained else resident)[f"{use.name} weights"] = weights
        if use.trained:
            (states if use.offload else resident).update(_named(use, state_bytes(use, coord)))
            gradients[f"{use.name} gradients"] = gradient_bytes(use, coord)
    return resident, gradients, states, lent


def _named(use: Use, terms: Mapping[str, int]) -> dict[str, int]:
    return {f"{use.name} {name}": size for name, size in terms.items()}
