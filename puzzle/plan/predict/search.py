"""Which layouts and options an iteration is fastest with, of those that fit the devices' memory.

Branch and bound over training (layout, micro-batch, shared pipelines, split backwards, recomputation,
offload) and generation (layout, decode micro-batches), which meet in the switch between them and in the
memory that training holds while the actor generates. Of plans with the same layouts that are within `ALIKE`
of one another the simplest stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from puzzle.errors import UserError
from puzzle.plan.layout import Layout
from puzzle.plan.predict.costs import Costs
from puzzle.plan.predict.footprints import Footprint, generation_footprint, together, training_footprint
from puzzle.plan.predict.iteration import (
    Part,
    Seconds,
    Workload,
    generation_seconds,
    inference_seconds,
    predict,
    switch_seconds,
    training_bound,
    training_seconds,
)
from puzzle.plan.predict.job import Choice, Job, Sizes
from puzzle.spec.model import ModelSpec

PARTS = (2, 4, 8)
"""Of the sequences of a replica, one of them is generated at a time where a queue is tried."""
ALIKE = 0.005
"""Share of an iteration below which a more complicated plan of the same layouts is not worth it."""


@dataclass(frozen=True)
class Plan:
    """A choice, what an iteration takes with it, and bytes of the rank that needs most: at the least
    (`Job.exact`), or at the most."""

    choice: Choice
    seconds: Seconds
    memory: int


@dataclass
class Found:
    """Plans, the fastest first, no two with the same layouts; and how many choices there were, and how many
    of those that were looked at did not fit."""

    plans: list[Plan]
    choices: int
    too_large: int


def search(job: Job, costs: Costs, top: int) -> Found:
    """The `top` fastest pairs of layouts. UserError if nothing fits."""
    generations = sorted(_generations(job, costs), key=lambda one: one.seconds)
    trainings = sorted(_trainings(job, costs), key=lambda one: one.least)
    if not generations or not trainings:
        raise UserError(f"--gpus {job.ranks}: no layout of so many processes fits the models and the batch")
    kept: dict[tuple[Sizes, Sizes], list[Plan]] = {}
    smallest, too_large = None, 0
    quickest = generations[0].seconds
    for training in trainings:
        cutoff = _cutoff(kept, top)
        if training.least + quickest > cutoff:
            break
        held = training_footprint(job, training.choice)
        smallest = min(held.peak, smallest or held.peak)
        if held.peak > job.memory:
            too_large += 1
            continue
        trained = training_seconds(training.work, costs)
        cut = {job.parts(training.choice.training): held}
        for one in generations:
            if training.inference + trained + one.seconds > cutoff:
                break
            if "switch" in job.without and one.sizes != training.choice.training:
                continue
            parts = job.parts(training.choice.training, one.sizes)
            if parts not in cut:
                cut[parts] = training_footprint(job, replace(training.choice, generation=one.sizes))
            most = together(job, cut[parts], one.footprints[parts])
            if most > job.memory:
                too_large += 1
                continue
            work = replace(training.work, generation=one.layout, decode=one.decode, slots=one.slots)
            seconds = Seconds(one.seconds, training.inference, trained, switch_seconds(work, costs))
            choice = replace(training.choice, generation=one.sizes, decode=one.decode, slots=one.slots)
            plan = Plan(choice, seconds, most)
            kept.setdefault((choice.training, choice.generation), []).append(plan)
    if not kept:
        need = "" if smallest is None else f"; training takes {smallest / 2**30:.1f} GiB at the least"
        raise UserError(
            f"--gpus {job.ranks}: no plan fits {job.memory / 2**30:.1f} GiB per device{need};"
            " give more devices, or lower batch or generation.max_new_tokens"
        )
    plans = sorted((_simplest(plans) for plans in kept.values()), key=lambda plan: plan.seconds.total)
    return Found(plans[:top], len(trainings) * len(generations), too_large)


def sizes(ranks: int, per_node: int, spec: ModelSpec, most_dp: int) -> Iterator[Sizes]:
    """All (tp, pp, dp) of so many ranks in which a model can be cut, tensor groups inside machines."""
    for tp in range(1, min(ranks, per_node) + 1):
        if ranks % tp or per_node % tp:
            continue
        for pp in range(1, min(ranks // tp, spec.num_layers) + 1):
            dp, rest = divmod(ranks // tp, pp)
            if rest or dp > most_dp:
                continue
            try:
                Layout.even(tp, pp, dp, spec.num_layers).check(spec)
            except UserError:
                break
            yield tp, pp, dp


def workload(job: Job, choice: Choice) -> Workload:
    """What an iteration does by a choice."""
    specs = {role.name: role.spec for role in job.roles}

    def parts(names: Sequence[str]) -> tuple[Part, ...]:
        return tuple(Part(specs[name], job.layout(specs[name], choice.training)) for name in names)

    actor = Part(job.actor.spec, job.layout(job.actor.spec, choice.training))
    return replace(
        job.work,
        actor=actor,
        generation=job.layout(job.actor.spec, choice.generation),
        trained=parts(job.trained),
        inferred=parts(job.inferred),
        stepped=len(job.trained),
        microbatch=choice.microbatch,
        decode=choice.decode,
        slots=choice.slots or job.work.slots,
        fuse_training=choice.fuse_training,
        fuse_inference=choice.fuse_inference,
        split=choice.split,
        recompute=choice.recompute,
        offload=choice.offload,
    )


def predicted(job: Job, choice: Choice, costs: Costs) -> Seconds:
    """What an iteration takes by a choice."""
    return predict(workload(job, choice), costs)


@dataclass(frozen=True)
class _Training:
    choice: Choice
    work: Workload
    inference: float
    least: float


@dataclass(frozen=True)
class _Generation:
    sizes: Sizes
    layout: Layout
    decode: int | None
    slots: int | None
    seconds: float
    footprints: dict[int | None, Footprint]


def _trainings(job: Job, costs: Costs) -> Iterator[_Training]:
    """All ways to train, with what they take at the least."""
    for laid in _common_sizes(job):
        for microbatch in _microbatches(-(-job.work.minibatch // laid[2])):
            plain = Choice(laid, laid, microbatch)
            work = workload(job, plain)
            inference, fused = inference_seconds(work, costs), False
            if laid[1] > 1 and len(job.inferred) > 1 and "fusion" not in job.without:
                together = inference_seconds(replace(work, fuse_inference=True), costs)
                fused = together < inference * (1 - ALIKE)
                inference = min(inference, together) if fused else inference
            for options in _options(job, laid[1]):
                choice = replace(plain, fuse_inference=fused, **options)
                work = workload(job, choice)
                yield _Training(choice, work, inference, inference + training_bound(work, costs))


def _common_sizes(job: Job) -> list[Sizes]:
    """Layouts that all models can have."""
    limits = [(role.spec, job.work.minibatch if role.trained else job.work.sequences) for role in job.roles]
    found = [set(sizes(job.ranks, job.per_node, spec, most)) for spec, most in limits]
    return sorted(filter(job.allows, set.intersection(*found)))


def _microbatches(rows: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < rows] + [rows] * (rows <= 128)


def _options(job: Job, pp: int) -> Iterator[dict[str, bool]]:
    """Those that change something: one stage has no bubble to fill."""
    several, stages = len(job.trained) > 1, pp > 1

    def both(idea: str, useful: bool = True) -> tuple[bool, ...]:
        return (False, True) if useful and idea not in job.without else (False,)

    for fuse in both("fusion", several and stages):
        for split, recompute in itertools.product(both("split", stages), both("recompute")):
            if split and recompute:
                continue
            for offload in both("offload"):
                yield {"fuse_training": fuse, "split": split, "recompute": recompute, "offload": offload}


def _generations(job: Job, costs: Costs) -> Iterator[_Generation]:
    spec, work = job.actor.spec, job.work
    for laid in filter(job.allows, sizes(job.ranks, job.per_node, spec, work.sequences)):
        layout = job.layout(spec, laid)
        whole = -(-work.sequences // layout.dp)
        queues = {-(-whole // parts) for parts in PARTS} - {whole} if work.slots is None else set()
        for slots in (work.slots, *sorted(queues, reverse=True)):
            yield from _queued(job, costs, laid, layout, slots)


def _queued(job: Job, costs: Costs, laid: Sizes, layout: Layout, slots: int | None) -> Iterator[_Generation]:
    """Ways to cut decode passes of so many sequences at a time."""
    spec, work, pp = job.actor.spec, job.work, layout.pp
    rows = -(-work.sequences // layout.dp)
    rows = min(rows, slots or rows)
    counts = {1, pp // 2, 2 * pp} - {0, pp} if pp > 1 else set()
    for decode in (None, *sorted({-(-rows // count) for count in counts} - {-(-rows // pp)})):
        asked = replace(work, actor=Part(spec, layout), generation=layout, decode=decode, slots=slots)
        footprints = {
            parts: generation_footprint(job, layout, decode, slots, parts) for parts in job.parts_beside(laid)
        }
        yield _Generation(laid, layout, decode, slots, generation_seconds(asked, costs), footprints)


def _cutoff(kept: dict[tuple[Sizes, Sizes], list[Plan]], top: int) -> float:
    """Seconds beyond which a plan is not among the `top` pairs of layouts."""
    if len(kept) < top:
        return float("inf")
    best = sorted(min(plan.seconds.total for plan in plans) for plans in kept.values())
    return best[top - 1] * (1 + ALIKE)


def _simplest(plans: Sequence[Plan]) -> Plan:
    """Of plans about as fast as the fastest the one that does least."""
    quickest = min(plan.seconds.total for plan in plans)
    alike = [plan for plan in plans if plan.seconds.total <= quickest * (1 + ALIKE)]
    return min(alike, key=lambda plan: (plan.choice.complexity, plan.seconds.total))
