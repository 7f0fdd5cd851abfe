"""Which models share a pipeline, in which order, and whether it pays: candidates are simulated with measured
costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

from puzzle.plan.pipeline.actions import Op, Schedule
from puzzle.plan.pipeline.schedules import Order, PipelineModel, forward_only, microbatch_order, one_f_one_b
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import makespan, simulate


@dataclass(frozen=True)
class FusionGroup:
    """One model, or several in one pipeline: the model of every place in it, and `defer` of `one_f_one_b`."""

    order: tuple[str, ...]
    defer: int = 1


@dataclass(frozen=True)
class Candidate:
    """Groups that run one after the other and together do the work of a stage of the iteration; a schedule of
    each."""

    name: str
    schedules: tuple[Schedule, ...]
    groups: tuple[FusionGroup, ...]


@dataclass(frozen=True)
class Estimate:
    """What a candidate takes: seconds, times the pipeline runs empty, idle share of compute."""

    candidate: Candidate
    seconds: float
    flushes: int
    bubble_share: float


def choose_fusion(candidates: Sequence[Candidate], cost: CostTable) -> tuple[Estimate, ...]:
    """Estimates from best to worst; among equals the earlier candidate comes first."""
    return tuple(sorted((estimate(c, cost) for c in candidates), key=lambda e: e.seconds))


def estimate(candidate: Candidate, cost: CostTable) -> Estimate:
    """Simulates a candidate's schedules one after the other."""
    timelines = [simulate(schedule, cost) for schedule in candidate.schedules]
    seconds = sum(t.makespan for t in timelines)
    idle = sum(t.makespan * t.bubble_share() for t in timelines)
    flushes = sum(schedule.flushes for schedule in candidate.schedules)
    return Estimate(candidate, seconds, flushes, idle / seconds if seconds else 0.0)


DEFER = (1, 2, 4)
"""Values of `FusionGroup.defer` that are tried."""

Build = Callable[..., Schedule]
"""A schedule of `(models, num_stages, order)`, when training also by `defer`."""


def candidate(
    name: str, groups: Sequence[FusionGroup], models: Sequence[PipelineModel], num_stages: int, build: Build
) -> Candidate:
    """The candidate of some groups. UserError if an order does not fit the models' micro-batches."""
    schedules = []
    for group in groups:
        members = [m for m in models if m.name in group.order]
        options = {} if group.defer == 1 else {"defer": group.defer}
        schedules.append(build(members, num_stages, group.order, **options))
    return Candidate(name, tuple(schedules), tuple(groups))


def apart(models: Sequence[PipelineModel]) -> list[FusionGroup]:
    """Every model by itself."""
    return [FusionGroup((m.name,) * m.microbatches) for m in models]


MOST_TRIALS, MOST_PASSES = 200, 1 << 15
"""Simulations of a search, and micro-batches x stages of all of them: a second or two."""


def search_trials(models: Sequence[PipelineModel], num_stages: int) -> int:
    """How many orders a search simulates: MOST_TRIALS, and fewer of schedules that are long."""
    return max(1, min(MOST_TRIALS, MOST_PASSES // (num_stages * sum(m.microbatches for m in models))))


def training_candidates(
    models: Sequence[PipelineModel],
    num_stages: int,
    cost: CostTable,
    *,
    trials: int | None = None,
) -> list[Candidate]:
    """Apart, one after the other in every order, alternating from every first model, and the best order
    found in `trials` simulations (those of `search_trials`); each fused one with the best of `DEFER` (see
    `one_f_one_b`). All that once more with split backwards where the costs of their parts are
    known, and with these alone where those of whole ones are not."""
    trials = trials or search_trials(models, num_stages)
    candidates = []
    for split in _splits(models, num_stages, cost):
        build = partial(one_f_one_b, split=split)
        for found in _orders(models, num_stages, cost, build, trials):
            candidates.append(replace(found, name=f"{found.name}, split" if split else found.name))
    return candidates


def trained_apart(models: Sequence[PipelineModel], num_stages: int, cost: CostTable) -> Candidate:
    """The first of `training_candidates`, whose schedules ask for every cost that the others' ask for."""
    build = partial(one_f_one_b, split=_splits(models, num_stages, cost)[0])
    return candidate("apart", apart(models), models, num_stages, build)


def _splits(models: Sequence[PipelineModel], num_stages: int, cost: CostTable) -> list[bool]:
    """Whether backwards are split, by the costs that are known."""
    names = [m.name for m in models]
    splits = [False] if num_stages == 1 or cost.knows(names, Op.BACKWARD) else []
    if num_stages > 1 and cost.knows(names, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
        splits.append(True)
    return splits or [False]


def _orders(
    models: Sequence[PipelineModel],
    num_stages: int,
    cost: CostTable,
    build: Build,
    trials: int,
) -> list[Candidate]:
    candidates = [candidate("apart", apart(models), models, num_stages, build)]
    if len(models) == 1:
        return candidates
    orders: dict[str, list[str]] = {}
    for kind in ("sequential", "alternating"):
        for arranged in permutations(models):
            name = f"{kind} {' '.join(m.name for m in arranged)}"
            orders[name] = [model for model, _ in microbatch_order(arranged, kind)]

    def seconds(order: Order) -> float:
        return makespan(build(models, num_stages, order), cost)

    orders["searched"] = search_order(min(orders.values(), key=seconds), seconds, trials)
    for name, order in orders.items():
        variants = [candidate(name, [FusionGroup(tuple(order), d)], models, num_stages, build) for d in DEFER]
        candidates.append(min(variants, key=lambda c: makespan(c.schedules[0], cost)))
    return candidates


def inference_candidates(models: Sequence[PipelineModel], num_stages: int) -> list[Candidate]:
    """Every way to group the models into forward-only pipelines, each in every order."""
    candidates = []
    for partition in _partitions(list(models)):
        for arranged in _arrangements(partition):
            name = " | ".join(" ".join(m.name for m in members) for members in arranged)
            groups = [
                FusionGroup(tuple(m.name for m in members for _ in range(m.microbatches)))
                for members in arranged
            ]
            candidates.append(candidate(name, groups, models, num_stages, forward_only))
    return candidates


def search_order(start: Sequence[str], seconds: Callable[[Order], float], trials: int) -> list[str]:
    """Hill climbing from an order: a run of one model's micro-batches moves to another place; strides
    halve when no move helps. Asks for at most `trials` simulations and is never worse than `start`."""
    best = list(start)
    best_seconds, left = seconds(best), trials - 1
    stride = max(1, len(best) // 2)
    while stride and left > 0:
        improved = False
        for moved in _moves(best, stride):
            if left <= 0:
                break
            left -= 1
            if (found := seconds(moved)) < best_seconds:
                best, best_seconds, improved = moved, found, True
                break
        stride = stride if improved else stride // 2
    return best


def _moves(order: list[str], stride: int) -> Iterator[list[str]]:
    """Orders in which `stride` neighbouring places have moved; those that change nothing are left out."""
    for source in range(0, len(order) - stride + 1, stride):
        run, rest = order[source : source + stride], order[:source] + order[source + stride :]
        for target in range(0, len(rest) + 1, stride):
            moved = rest[:target] + run + rest[target:]
            if moved != order:
                yield moved


def _partitions(models: list[PipelineModel]) -> Iterator[list[list[PipelineModel]]]:
    if not models:
        yield []
        return
    first, rest = models[0], models[1:]
    for groups in _partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


def _arrangements(groups: list[list[PipelineModel]]) -> Iterator[list[list[PipelineModel]]]:
    if not groups:
        yield []
        return
    for head in permutations(groups[0]):
        for tail in _arrangements(groups[1:]):
            yield [list(head), *tail]
