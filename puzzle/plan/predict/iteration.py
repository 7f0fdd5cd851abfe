"""A whole PPO iteration in virtual time, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puzzle.plan.layout import Layout
from puzzle.plan.pages import PREFILL_TOKENS, kv_bytes
from puzzle.plan.predict.costs import Costs, Pass, replicas_apart
from puzzle.plan.predict.lengths import Lengths, merged, stretches
from puzzle.plan.predict.passes import decode_stages, stage_costs
from puzzle.plan.predict.recurrences import (
    StageCosts,
    forward_makespan,
    issued,
    training_least,
    training_makespan,
)
from puzzle.plan.predict.shares import local_share
from puzzle.spec.model import ModelSpec

STATE_BYTES = 12
"""Of a parameter: moments and master weights in fp32."""


@dataclass(frozen=True)
class Part:
    """One model of a stage of the iteration, and how it lies."""

    spec: ModelSpec
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one iteration runs. Prompts count at full length, responses as `lengths` says.

    Attributes:
        actor: the policy as it trains; `generation` is the layout in which it generates.
        trained, inferred: the models of both stages, in the order in which they run.
        stepped: how many of the trained ones, the first, the optimizer steps (published bulk runs: one).
        sequences, minibatch: of an iteration, and of an optimizer step, over all replicas.
        steps: optimizer steps.
        microbatch, prefill, decode: sequences of one pass (None: no limit, or an even share per stage).
        fuse_training, fuse_inference: the models of the stage share a pipeline.
        split, recompute: backwards are split; they compute their forwards again.
        graphs: decode passes are recorded and replayed, where the engine can.
        offload: optimizer states are on the host outside of training.
        lengths: of responses; None: all are `response` long.
        early_stop: sequences that have ended are decoded no longer.
        slots: most sequences of a replica that are decoded at a time; None: all of them.
        samples: sequences of a prompt, which is prefilled once.
        prefill_tokens: most of a prefill pass; longer prompts are cached in parts.
        kept: cache and graphs are there from the iteration before.
        recursed: positions of a response whose advantages follow one from another (none: 0).
        remapped: bytes that training gives back before generation and takes anew, as both do not fit at once.
    """

    actor: Part
    generation: Layout
    trained: tuple[Part, ...]
    inferred: tuple[Part, ...]
    stepped: int
    sequences: int
    minibatch: int
    steps: int
    prompt: int
    response: int
    microbatch: int | None
    prefill: int | None = None
    decode: int | None = None
    fuse_training: bool = False
    fuse_inference: bool = False
    split: bool = False
    recompute: bool = False
    graphs: bool = False
    offload: bool = False
    lengths: Lengths | None = None
    early_stop: bool = True
    slots: int | None = None
    samples: int = 1
    prefill_tokens: int = PREFILL_TOKENS
    kept: bool = False
    recursed: int = 0
    remapped: float = 0.0

    @property
    def tokens(self) -> float:
        """Of a sequence, on average."""
        return self.prompt + (self.response if self.lengths is None else self.lengths.mean)


@dataclass(frozen=True)
class Seconds:
    """Of the stages of one iteration."""

    generation: float
    inference: float
    training: float
    switch: float

    @property
    def total(self) -> float:
        """End to end."""
        return self.generation + self.inference + self.training + self.switch


def predict(work: Workload, costs: Costs) -> Seconds:
    """Seconds of every stage of an iteration; O(stages x micro-batches)."""
    return Seconds(
        generation_seconds(work, costs),
        inference_seconds(work, costs),
        training_seconds(work, costs),
        switch_seconds(work, costs),
    )


def _cut(sequences: int, dp: int, size: int | None) -> tuple[int, int]:
    """Sequences of a micro-batch of the largest replica, and how many there are."""
    rows = -(-sequences // dp)
    each = min(rows, size or rows)
    return each, -(-rows // each)


def pipeline_costs(
    parts: Sequence[Part], work: Workload, sequences: int, costs: Costs, trained: bool
) -> tuple[list[StageCosts], list[int]]:
    """Costs and numbers of micro-batches of models in one pipeline; logits are made at every position, or at
    answers alone."""
    length, found, counts = round(work.tokens), [], []
    headed = length - work.prompt if costs.this_engine else length
    for part in parts:
        rows, count = _cut(sequences, part.layout.dp, work.microbatch)
        one = Pass(rows * length, length, rows * headed, trained)
        how = {"recompute": work.recompute, "split": work.split and trained}
        found.append(stage_costs(part.spec, part.layout, one, costs, **how))
        counts.append(count)
    return found, counts


class _Streams:
    """Pipelines one after the other: devices begin one when the last of them has ended the one before, hosts
    go on without waiting."""

    def __init__(self, work: Workload, costs: Costs) -> None:
        self.work, self.costs = work, costs
        self.seconds = 0.0
        self._hosts: list[float] = []

    def prepare(self, parts: Sequence[Part], sequences: int) -> None:
        """The micro-batches of all models, before the first pass of one."""
        counts = [_cut(sequences, part.layout.dp, self.work.microbatch)[1] for part in parts]
        ahead = self._hosts or [0.0] * parts[0].layout.pp
        self._hosts = [one + self.costs.fixed.prepare_s * sum(counts) for one in ahead]

    def run(
        self, parts: Sequence[Part], sequences: int, makespan: Callable[..., float] | None = None
    ) -> None:
        """Models that share a pipeline; trained ones with the `makespan` of their passes."""
        stages, counts = pipeline_costs(parts, self.work, sequences, self.costs, makespan is not None)
        ahead = self._hosts or [0.0] * len(stages[0].forward)
        begin = tuple(one - self.seconds for one in ahead)
        taken = issued(stages, counts, makespan is not None)
        self._hosts = [one + more for one, more in zip(ahead, taken, strict=True)]
        self.seconds += (makespan or forward_makespan)(stages, counts, begin)


def inference_seconds(work: Workload, costs: Costs) -> float:
    """Forward passes of the models that judge, together or one after the other, and what advantages take."""
    streams = _Streams(work, costs)
    streams.prepare(work.inferred, work.sequences)
    for parts in [work.inferred] if work.fuse_inference else [[part] for part in work.inferred]:
        streams.run(parts, work.sequences)
    return streams.seconds + costs.fixed.stage_s + costs.fixed.position_s * work.recursed


def training_seconds(work: Workload, costs: Costs) -> float:
    """Passes and optimizer steps of all trained models."""
    return _training(work, costs, training_makespan)


def training_bound(work: Workload, costs: Costs) -> float:
    """What `training_seconds` never falls below, in O(stages)."""
    return _training(work, costs, training_least)


def _training(work: Workload, costs: Costs, makespan: Callable[..., float]) -> float:
    """With the passes of models that share a pipeline, or one after the other, as `makespan` says. Where
    hosts are told apart, all steps but the first are like the second, which they begin ahead of devices."""
    streams, ends = _Streams(work, costs), [0.0]
    steps = [step_seconds(part, costs) for part in work.trained[: work.stepped]]
    steps += [0.0] * (len(work.trained) - len(steps))
    apart = costs.this_engine and work.steps > 1
    for _ in range(2 if apart else 1):
        streams.prepare(work.trained, work.minibatch)
        if work.fuse_training:
            streams.run(work.trained, work.minibatch, makespan)
            streams.seconds += sum(steps)
        else:
            for part, step in zip(work.trained, steps, strict=True):
                streams.run([part], work.minibatch, makespan)
                streams.seconds += step
        ends.append(streams.seconds)
    return ends[1] + (work.steps - 1) * (ends[-1] - ends[-2]) + _around_training(work, costs)


def _around_training(work: Workload, costs: Costs) -> float:
    """Memory that generation had is taken anew; offloaded states come before, and leave after it."""
    fixed = costs.fixed
    around = fixed.stage_s + fixed.map_s_per_byte * work.remapped
    if not work.offload:
        return around
    moved = sum(
        STATE_BYTES * part.spec.trained_parameters / (part.layout.tp * part.layout.pp * part.layout.dp)
        for part in work.trained
    )
    return around + 2 * moved * fixed.host_s_per_byte


def step_seconds(part: Part, costs: Costs) -> float:
    """An optimizer step, and the sums and spreads over replicas around it."""
    layout = part.layout
    held = part.spec.trained_parameters / (layout.tp * layout.pp)
    return costs.fixed.step_s + costs.step(held, layout.dp, replicas_apart(costs.nodes, layout))


def generation_seconds(work: Workload, costs: Costs) -> float:
    """Prefill through the pipeline, then steps of the decode ring; before them what mapping the cache and
    recording graphs take, unless both are kept. The published engine draws first tokens in prefill; this one
    makes no logits there, and first tokens are drawn by a step like the others."""
    spec, layout = work.actor.spec, work.generation
    rows = -(-work.sequences // layout.dp)
    prompts = -(-rows // work.samples)
    share = -(-prompts // layout.pp)
    size, count = _cut(prompts, 1, min(work.prefill or share, max(1, work.prefill_tokens // work.prompt)))
    parts = -(-work.prompt // work.prefill_tokens)
    headed = 0 if costs.this_engine else size
    one, count = Pass(size * work.prompt // parts, work.prompt, headed), count * parts
    stages = stage_costs(spec, layout, one, costs)
    prefill = forward_makespan([StageCosts(stages.forward, issued=stages.issued)], [count])
    _, count = decode_cut(work)
    fixed = costs.fixed
    cache = kv_bytes(
        spec, layout, 0, min(rows, work.slots or rows) * (work.prompt + work.response), costs.item
    )
    before = fixed.map_s_per_byte * ((0 if work.kept else cache) + work.remapped) + fixed.stage_s
    if work.graphs and not work.kept:
        before += fixed.capture_s_per_bucket * count
    return before + prefill + decode_seconds(work, costs)


def decode_cut(work: Workload) -> tuple[int, int]:
    """Sequences of a decode micro-batch of the largest replica, and how many there are."""
    rows = -(-work.sequences // work.generation.dp)
    rows = min(rows, work.slots or rows)
    return _cut(rows, 1, work.decode or -(-rows // work.generation.pp))


def decode_seconds(work: Workload, costs: Costs) -> float:
    """Steps of the ring, with the sequences that are there: one per token, of the published engine but the
    first."""
    rows = -(-work.sequences // work.generation.dp)
    size, count = decode_cut(work)
    lengths = None if work.lengths is None else work.lengths.drawn(rows)
    if lengths is None or not work.early_stop:
        lengths = [work.response] * rows
    first = int(costs.this_engine)
    total = 0.0
    for stretch in merged(stretches([length + first for length in lengths], size * count)):
        each = -(-stretch.active // count)
        cached = work.prompt + stretch.grown - first
        ring = decode_stages(work.actor.spec, work.generation, each, cached, costs, work.graphs)
        total += stretch.steps * ring.step(-(-stretch.active // each))
    return total


def switch_seconds(work: Workload, costs: Costs) -> float:
    """What a rank lacks of its weights of generation, by messages at the one rate that is known of them."""
    source, destination = work.actor.layout, work.generation
    if source == destination:
        return 0.0
    held = costs.item * work.actor.spec.parameters / (destination.tp * destination.pp)
    across = costs.nodes is not None and source.world > costs.nodes.devices
    return costs.send((1 - local_share(source, destination)) * held, across) + costs.fixed.stage_s
