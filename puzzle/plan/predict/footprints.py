"""Device memory of a plan by the few ranks that tell, out of `plan.memory`: closed forms for a search.

Ranks of one stage are alike but for optimizer states, of which the first replica has as many rows as any; of
stages between the ends with as many layers, 1F1B keeps most micro-batches on the first and split backwards
most on the last. Where models share a pipeline of split backwards it may be one between: what a stage keeps
turns where all micro-batches of a model are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.memory import Switched, Use, Work, largest_pass, rank_memory, weight_bytes
from puzzle.plan.predict.job import Choice, Job
from puzzle.plan.predict.shares import local_share


def telling_stages(layouts: Sequence[Layout], counts: Sequence[int] = ()) -> list[int]:
    """Stages of which one needs the most memory, and one the least, of models in `layouts` of as many stages,
    where those between the ends with as many layers lie side by side. `counts`: micro-batches of an optimizer
    step of those models that share a pipeline with split backwards."""
    pp = layouts[0].pp
    between: dict[tuple[int, ...], list[int]] = {}
    for stage in range(1, pp - 1):
        between.setdefault(tuple(layout.stage_layers[stage] for layout in layouts), []).append(stage)
    ends = {end for stages in between.values() for end in (stages[0], stages[-1])}
    full = {sum(some) for n in range(1, len(counts) + 1) for some in combinations(counts, n)}
    turns = {turn for count in full for turn in (count, pp - count) if 0 < turn < pp}
    return sorted({0, pp - 1} | ends | turns)


@dataclass(frozen=True)
class Footprint:
    """Bytes by stage of `layout`: `always` there (in training: what all models hold, in generation what it
    adds), and `peaks` of the stages of the iteration that run in this layout. `weights` are those of the
    actor here, `states` what offloading brings in a switch, `kept` what generation leaves in all stages."""

    layout: Layout
    always: dict[int, int]
    weights: dict[int, int]
    states: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Of the stage of `layout` that needs most."""
        return max(self.peaks.values())


def training_footprint(job: Job, choice: Choice) -> Footprint:
    """Of ranks that train and infer by a choice. Under invariant numerics a generation of more tensor ranks
    cuts their sums too."""
    uses = uses_of(job, choice)
    placement = uses[0].placement
    work = _work(job, choice.microbatch, None)
    shared = [use for use in uses if use.trained and use.split and choice.fuse_training]
    counts = [largest_pass(use, work, 0, work.minibatch)[1] for use in shared]
    stages = telling_stages([use.placement.layout for use in uses], counts)
    always, states, weights, peaks = {}, {}, {}, {}
    for p in stages:
        coord = Coord(0, p, 0)
        rank = rank_memory(placement.rank_of(coord), uses, uses[0], work, Switched(), choice.fuse_training)
        always[p], states[p] = sum(rank.resident.values()), sum(rank.stages["switch"].values())
        weights[p] = weight_bytes(job.actor.spec, placement.layout, coord, job.itemsize)
        peaks[p] = max(rank.total("inference"), rank.total("training"))
    return Footprint(placement.layout, always, weights, states, peaks)


def generation_footprint(
    job: Job, layout: Layout, decode: int | None, slots: int | None = None, parts: int | None = None
) -> Footprint:
    """Of what generation adds: the cache, and the widest pass; `parts` are those of `Job.parts`."""
    placement = Placement.default(layout)
    actor = Use("actor", job.actor.spec, placement, job.itemsize, True, fused=job.fused, parts=parts)
    work, always, weights, kept = _work(job, None, decode, slots), {}, {}, {}
    for p in telling_stages([layout]):
        coord = Coord(0, p, 0)
        own = actor.placement.rank_of(coord)
        rank = rank_memory(own, [actor], actor, work, Switched(), False, keep=job.keep)
        always[p] = sum(rank.stages["generation"].values())
        weights[p] = weight_bytes(actor.spec, layout, coord, job.itemsize)
        kept[p] = sum(rank.stages["switch"].values())  # nothing else: it is not switched, nor trained
    return Footprint(layout, always, weights, kept=kept)


def together(job: Job, training: Footprint, generation: Footprint) -> int:
    """Bytes of the rank that needs most in the worst stage of an iteration.

    Exact where generation uses the training layout. Else it depends on which rank plays what: if `job.exact`
    it is what some rank needs at the least, after the share of its weights that it may have; otherwise what
    none exceeds, nothing being there before.
    """
    kept, weights = generation.kept, generation.weights
    if generation.layout == training.layout:
        generating = max(training.always[p] + more for p, more in generation.always.items())
        return max(generating, *(training.peaks[p] + more for p, more in kept.items()))
    if job.exact:
        lacking = 1 - local_share(training.layout, generation.layout)
        added = max(more + lacking * weights[p] for p, more in generation.always.items())
        trained = (peak + _stays(job, training, generation, p) for p, peak in training.peaks.items())
        return max(*trained, int(min(training.always.values()) + added))
    added = max(more + weights[p] for p, more in generation.always.items())
    stays = max(kept[p] + job.keep * weights[p] for p in kept)
    filling = max(weights.values()) + max(kept.values()) + job.staging
    held = max(training.always[p] + training.states[p] for p in training.always)
    generating = max(training.always.values()) + added
    return max(training.peak + stays, held + filling, generating + job.staging)


def _stays(job: Job, training: Footprint, generation: Footprint, p: int) -> int:
    """Bytes that generation leaves on ranks of a stage of training at the least: what graphs read, and the
    weights that are not those of that stage."""
    lacking = {q: job.keep * max(0, size - training.weights[p]) for q, size in generation.weights.items()}
    return min(more + lacking[q] for q, more in generation.kept.items())


def uses_of(job: Job, choice: Choice) -> list[Use]:
    """All models as they are held in training."""
    return [
        Use(
            role.name,
            role.spec,
            Placement.default(job.layout(role.spec, choice.training)),
            job.itemsize,
            role.trained,
            recompute=role.trained and choice.recompute,
            fused=job.fused,
            compiled=job.compiled,
            offload=choice.offload if role.trained else role.offload,
            split=role.trained and choice.split,
            borrowed=role.borrowed,
            parts=job.parts(choice.training, choice.generation),
        )
        for role in job.roles
    ]


def _work(job: Job, microbatch: int | None, decode: int | None, slots: int | None = None) -> Work:
    work = job.work
    return Work(
        work.sequences,
        work.minibatch,
        work.prompt,
        work.response,
        microbatch,
        work.prefill,
        decode,
        samples=work.samples,
        most=slots or work.slots,
        prefill_tokens=work.prefill_tokens,
    )
