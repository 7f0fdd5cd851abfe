"""Device bytes of every rank, from shapes alone: what always lies there, and what each stage adds.

Activations are the tensors that the operations of `model.decoder` save for their backward passes, counted one
by one for full-length sequences; a schedule says for how many micro-batches at once. Suffixes in formulas:
T tokens of a pass, S = T/tp, D hidden, Q = H h/tp query columns, R = K h/tp key columns, F ffn columns/tp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.pipeline.schedules import in_flight
from puzzle.plan.shards import local_params
from puzzle.spec.model import ModelSpec

FP32 = 4
LOGITS_BLOCK = 1 << 24
"""Most fp32 logits in one tensor (`model.logprobs.BLOCK`)."""
PREFILL_TOKENS = 8192
"""Tokens after which a prefill pass is full (`engine.generate.PREFILL_TOKENS`)."""


@dataclass(frozen=True)
class Use:
    """One model of a run. `itemsize` is bytes per weight; `fused`: norms are single kernels (CUDA);
    `compiled`: layers run through torch.compile. `offload`: optimizer states, or the weights of a model that
    is not trained, are on the host where they are not needed. `split`: pipelines compute weights' gradients
    apart (`intra.split_backward`)."""

    name: str
    spec: ModelSpec
    placement: Placement
    itemsize: int
    trained: bool = False
    recompute: bool = False
    fused: bool = True
    compiled: bool = False
    offload: bool = False
    split: bool = False


@dataclass(frozen=True)
class Work:
    """What one iteration runs, for full-length sequences. Counts are of sequences over all replicas, but for
    `microbatch`, `prefill` and `decode`, which are sequences of one pass (None: no limit, or for the latter
    two an even share per stage). `microbatch_tokens` limits passes by tokens instead: many short sequences
    may fill one."""

    batch: int
    minibatch: int
    prompt: int
    response: int
    microbatch: int | None = None
    prefill: int | None = None
    decode: int | None = None
    microbatch_tokens: int | None = None

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by term: `resident` ones always, a stage's in it. `host`: what is offloaded."""

    rank: int
    resident: Mapping[str, int]
    stages: Mapping[str, Mapping[str, int]]
    host: int = 0

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


@lru_cache
def _storages(spec: ModelSpec, layout: Layout, p: int) -> tuple[tuple[int, int], ...]:
    """Rows and elements per row of a stage's storages, which are alike for all t and d."""
    return tuple((param.rows, param.row_size) for param in local_params(spec, layout, Coord(0, p, 0)))


def weight_bytes(spec: ModelSpec, layout: Layout, coord: Coord, itemsize: int) -> int:
    """The storages of a coordinate, vocabulary padding included."""
    return itemsize * sum(rows * size for rows, size in _storages(spec, layout, coord.p))


def state_bytes(use: Use, coord: Coord) -> dict[str, int]:
    """ZeRO-1: moments, and fp32 masters where weights are not fp32, of the replica's own rows."""
    dp, own = use.placement.layout.dp, 0
    for rows, size in _storages(use.spec, use.placement.layout, coord.p):
        chunk = -(-rows // dp)
        own += size * max(0, min(chunk, rows - coord.d * chunk))
    return {"moments": 2 * FP32 * own, "masters": 0 if use.itemsize == FP32 else FP32 * own}


def gradient_bytes(use: Use, coord: Coord) -> int:
    """fp32 buffers of all replicas' rows; apart from them the own rows' sum, if it is not NCCL that adds up.

    Stepped rows spread in the same memory.
    """
    dp = use.placement.layout.dp
    return FP32 * _chunk(use, coord) * (dp if use.fused or dp == 1 else dp + 1)


def deferred_gather_bytes(use: Use, coord: Coord) -> int:
    """All replicas' stepped rows, where they spread after the gradients' buffers were given back."""
    dp = use.placement.layout.dp
    return use.itemsize * _chunk(use, coord) * dp if dp > 1 else 0


def _chunk(use: Use, coord: Coord) -> int:
    layout = use.placement.layout
    return sum(-(-rows // layout.dp) * size for rows, size in _storages(use.spec, layout, coord.p))


def kv_bytes(spec: ModelSpec, layout: Layout, p: int, rows: int, capacity: int, itemsize: int) -> int:
    """Keys and values of `rows` sequences of up to `capacity` tokens on stage p."""
    kv_heads = max(1, spec.num_kv_heads // layout.tp)
    return 2 * itemsize * layout.stage_layers[p] * rows * kv_heads * capacity * spec.head_dim


class Activations:
    """What one micro-batch of `tokens` tokens, `answers` of them answers, costs on a stage."""

    def __init__(self, use: Use, p: int, tokens: int, answers: int) -> None:
        spec, layout = use.spec, use.placement.layout
        self.use, self.p, self.answers, self.item = use, p, answers, use.itemsize
        self.T = -(-tokens // layout.tp) * layout.tp
        self.S = self.T // layout.tp
        self.D, self.F = spec.hidden_size, spec.intermediate_size // layout.tp
        self.heads = spec.num_heads // layout.tp
        self.kv_heads = max(1, spec.num_kv_heads // layout.tp)
        self.Q, self.R = self.heads * spec.head_dim, self.kv_heads * spec.head_dim
        self.rows = -(-spec.vocab_size // layout.tp) if spec.head == "lm" else spec.num_labels
        self.first, self.last = p == 0, p == layout.pp - 1

    def norm(self, rows: int, width: int) -> int:
        """What a norm saves but for the result: its input, and the factor of each row.

        Step by step it is computed in fp32: a converted input, and the result before the weight.
        """
        saved = self.item if self.use.fused else 2 * FP32
        return rows * width * saved + rows * FP32

    def layer(self) -> int:
        """What one layer saves: two norms and their results, queries, keys, values, attention's result with
        a factor per head, gate and up, the activated gate (kernels compute it again), the product."""
        norms = 2 * (self.norm(self.S, self.D) + self.S * self.D * self.item)
        columns = 2 * (self.Q + self.R)
        if not self.use.fused or self.use.spec.qk_norm:
            columns += self.Q + self.R  # values are a view of all columns of their product, so that it stays
        attention = self.T * (columns * self.item + self.heads * FP32)
        if self.use.spec.qk_norm:
            attention += self.norm(self.T, self.Q + self.R) - self.T * (self.Q + self.R) * (self.item)
        return (
            norms
            + attention
            + self.T * (3 if self.use.fused or self.use.compiled else 4) * self.F * self.item
        )

    def saved(self) -> int:
        """From a forward to its backward pass on this stage."""
        layers = self.use.placement.layout.stage_layers[self.p]
        rotation = 2 * self.T * self.use.spec.head_dim * self.item
        total = rotation + layers * (self.S * self.D * self.item if self.use.recompute else self.layer())
        if self.first:
            total += self.T * (8 if self.use.placement.layout.tp == 1 else 9)
        if not self.last:
            return total + self.S * self.D * self.item
        total += self.norm(self.S, self.D)
        if self.use.spec.head == "value":
            return total + self.S * self.D * FP32
        return total + self.answers * (self.D * self.item + 6 * FP32)

    def deferred(self) -> int:
        """Between the parts of a split backward: what the four matrices of every layer multiplied, and the
        gradients of their results. Matrices that lie by rows see the whole pass's."""
        width = 2 * self.Q + 2 * self.R + 3 * self.F + 2 * self.D
        layer = self.item * (2 * self.S * self.D + self.T * width)
        return self.use.placement.layout.stage_layers[self.p] * layer

    def held(self, before: int, between: int) -> int:
        """Of `before` micro-batches before their backward and, where that is split, of `between` waiting for
        their weights' gradients; right after the first part of a backward they are one less and one more."""
        saved, deferred = self.saved(), self.deferred()
        if not self.use.split or self.use.placement.layout.pp == 1:
            return before * saved
        return before * saved + between * deferred + max(0, deferred - saved)

    def logits(self) -> int:
        """Blocks of fp32 logits, the gradients of the head and of what it reads; only on the last stage."""
        if not self.last or self.use.spec.head == "value":
            return 0
        block = FP32 * min(LOGITS_BLOCK, self.answers * self.rows)
        if not self.use.trained:
            return 2 * block
        gradients = self.answers * self.D * (FP32 + self.item) + self.rows * self.D * self.item
        return max(2 * block, block + block * self.item // FP32 + gradients)

    def transient(self) -> int:
        """Of one layer in its backward pass: two widths of the ffn more than what it saved and frees, hidden
        states, a layer to recompute; the gradient of the largest weight, unless its product adds it up."""
        layout = self.use.placement.layout
        largest = 0
        if not self.use.fused and self.item != FP32:
            largest = max(rows * size for rows, size in _storages(self.use.spec, layout, self.p)) * self.item
        hidden = self.T * self.D if layout.tp > 1 else 0
        gradients = (2 * self.T * self.F + 2 * self.S * self.D + hidden) * self.item
        return gradients + largest + (self.layer() if self.use.recompute else 0)

    def passing(self) -> dict[str, int]:
        """What comes and goes in a backward pass."""
        return _worst([{"logits": self.logits()}, {"one layer": self.transient()}])

    def forward(self) -> int:
        """Of a pass without gradients: a layer's hidden states, and the widest it has at a time."""
        ffn, attention = (3 if self.use.fused else 4) * self.F, 3 * self.Q + 3 * self.R
        gathered = self.T * self.D if self.use.placement.layout.tp > 1 else 0
        return self.item * (4 * self.S * self.D + gathered + self.T * max(ffn, attention))


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
    return {"activations": held, **one.passing()}


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
        passing.append(_named(use, one.passing()))
    return terms | _worst(passing)


def _passing(use: Use, work: Work, p: int) -> dict[str, int]:
    """A pass without gradients."""
    one, _ = largest_pass(use, work, p, work.batch)
    return _worst([{"one layer": one.forward()}, {"logits": one.logits()}])


def _generation(use: Use, work: Work, p: int) -> dict[str, int]:
    """The cache of all responses of a replica; a prefill pass, later the logits of a decode pass.

    Without a kernel, a draw holds about four tensors of logits' shape: logits, noise, their sum,
    probabilities. Passes take an even share per stage where no limit is given.
    """
    layout = use.placement.layout
    rows = -(-work.batch // layout.dp)
    even = -(-rows // layout.pp)
    most = max(1, PREFILL_TOKENS // work.prompt)
    one = Activations(use, p, work.prompt * min(_limited(rows, work.prefill or even), most), 0)
    logits = (1 if use.fused else 4) * FP32 * _limited(rows, work.decode or even) * one.rows
    return {
        "kv cache": kv_bytes(use.spec, layout, p, rows, work.length, use.itemsize),
        **_worst([{"one layer": one.forward()}, {"logits": logits if one.last else 0}]),
    }


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
) -> RankMemory:
    """What `rank` needs. `generation` is the actor where it generates, None where nothing does; `fused`: the
    trained models share a pipeline."""
    resident, training, states, lent = _held_by(rank, uses)
    trained = [use for use in uses if use.trained]
    steps = [_fused(trained, work, rank)] if fused else []
    if not fused:
        steps += [_named(use, _training(use, work, use.placement.coord_of(rank).p)) for use in trained]
    inferred = _worst([_named(use, _passing(use, work, use.placement.coord_of(rank).p)) for use in uses])
    stages = {"inference": {**lent, **inferred}, "training": {**states, **training, **_worst(steps)}}
    if generation is not None:
        made = _named(generation, _generation(generation, work, generation.placement.coord_of(rank).p))
        stages = {
            # Offloaded states leave when the weights are there.
            "switch": {"generation weights and staging": switched.filling, **states},
            "generation": {
                "generation weights": switched.weights,
                "actor deferred all-gather": switched.deferred_gather,
                **made,
            },
            **stages,
        }
    return RankMemory(rank, resident, stages, sum(states.values()) + sum(lent.values()))


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
        (lent if use.offload and not use.trained else resident)[f"{use.name} weights"] = weights
        if use.trained:
            (states if use.offload else resident).update(_named(use, state_bytes(use, coord)))
            gradients[f"{use.name} gradients"] = gradient_bytes(use, coord)
    return resident, gradients, states, lent


def _named(use: Use, terms: Mapping[str, int]) -> dict[str, int]:
    return {f"{use.name} {name}": size for name, size in terms.items()}


def _worst(cases: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of things that follow one another, the one that needs most."""
    return max(cases, key=lambda terms: sum(terms.values()))
