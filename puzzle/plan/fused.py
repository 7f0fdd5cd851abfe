"""Several models in one stream: the next model fills the pipeline while the one before drains.

For models that train together the stream is one 1F1B over the micro-batches of all of them, in any order
that keeps each model's own: with P stages, M micro-batches per model and equal costs, 2M + P - 1 slots of
forward and backward instead of 2(M + P - 1), and the same gradients as one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from puzzle.errors import UserError
from puzzle.plan.layout import Placement
from puzzle.plan.pipelines import Unit, interleave, optimizer_slots, pipeline
from puzzle.plan.schedule import Action, Op, Schedule, Work, most_held

Order = Literal["sequential", "alternating"] | Sequence[str]
"""One model after the other, evenly mixed, or spelled out: the model of every place in the stream."""


@dataclass(frozen=True)
class StreamModel:
    """A model in a stream. `activation_bytes[s]` is what one of its micro-batches holds on stage s between
    forward and backward, `deferred_bytes[s]` between the parts of a split backward (default: as much); only
    streams with a cap need them. `tied`: its embeddings are."""

    name: str
    microbatches: int
    activation_bytes: tuple[float, ...] = ()
    tied: bool = False
    deferred_bytes: tuple[float, ...] = ()


def stream(models: Sequence[StreamModel], order: Order) -> list[Unit]:
    """The micro-batches of all models in stream order. UserError if an order spelled out does not fit the
    models."""
    counts = {m.name: m.microbatches for m in models}
    if order == "sequential":
        return [(m.name, k) for m in models for k in range(m.microbatches)]
    if order == "alternating":
        # Every model's micro-batches lie evenly spread over the stream; on ties the first model leads.
        places = [
            ((k + 0.5) / m.microbatches, i, k) for i, m in enumerate(models) for k in range(m.microbatches)
        ]
        return [(models[i].name, k) for _, i, k in sorted(places)]
    if Counter(order) != counts:
        raise UserError(
            f"the stream order has {dict(Counter(order))} micro-batches, the models have {counts}"
        )
    seen: Counter[str] = Counter()
    units = []
    for name in order:
        units.append((name, seen[name]))
        seen[name] += 1
    return units


def fused_1f1b(
    models: Sequence[StreamModel],
    num_stages: int,
    order: Order = "sequential",
    *,
    cap_bytes: Sequence[float] | None = None,
    optimizer: bool = True,
    split: bool = False,
    defer: int = 1,
) -> Schedule:
    """Training of several models as one 1F1B stream.

    A stage holds at most P - s micro-batches between forward and backward, of all models together, and at
    most `cap_bytes[s]` (UserError if that is less than one micro-batch). The optimizer of a model that
    ends before the stream does is spread over the micro-batches that follow, see `optimizer_slots`. With
    `split` backwards (of several stages) up to s more wait on stage s for their weights' gradients, as many
    as the cap allows.
    """
    units = stream(models, order)
    split = split and num_stages > 1
    reach = _reach(models, units, num_stages, cap_bytes, split)
    behind = _behind(models, units, reach, cap_bytes) if split else None
    tied = {m.name for m in models if m.tied}
    slots = [
        optimizer_slots(units, s, num_stages, defer, tied, behind or ()) if optimizer else {}
        for s in range(num_stages)
    ]
    work = tuple(
        Work(m.name, m.microbatches, backward=True, optimizer=optimizer, tied=m.tied, split=split)
        for m in models
    )
    return pipeline("fused 1f1b", interleave(units, reach, slots, behind), work)


def fused_forward(models: Sequence[StreamModel], num_stages: int, order: Order = "sequential") -> Schedule:
    """Forwards of several models as one stream, without a drain between models."""
    passes = [Action(Op.FORWARD, *unit) for unit in stream(models, order)]
    work = tuple(Work(m.name, m.microbatches) for m in models)
    return pipeline("fused forward", [passes] * num_stages, work)


def stretched(order: Sequence[str], counts: Mapping[str, int]) -> tuple[str, ...]:
    """The same mix of models for other numbers of micro-batches: a micro-batch takes the place of the one
    that is as far in its model's share of `order`; on ties the first model of `counts` leads."""
    places: list[tuple[float, int, int, str]] = []
    for i, (name, count) in enumerate(counts.items()):
        old = [place for place, model in enumerate(order) if model == name]
        at = (np.arange(count) + 0.5) * len(old) / count - 0.5
        places += [(x, i, k, name) for k, x in enumerate(np.interp(at, range(len(old)), old).tolist())]
    return tuple(name for *_, name in sorted(places))


def shortened(schedule: Schedule, counts: Mapping[str, int]) -> Schedule:
    """The schedule of a pipeline with fewer micro-batches: of every model its last `counts[model]`, numbered
    from 0.

    Pipelines beside each other so keep one order of passes and of the optimizer's actions: all models' last
    backwards, with which reductions start, and what comes after them have the same places.
    """
    work = tuple(w for w in schedule.work if isinstance(w, Work))
    missing = {w.model: w.microbatches - counts[w.model] for w in work}
    if not any(missing.values()):
        return schedule

    def left(actions: Sequence[Action]) -> Iterator[Action]:
        for action in actions:
            if action.microbatch < 0:
                yield action
            elif action.microbatch >= missing[action.model]:
                yield replace(action, microbatch=action.microbatch - missing[action.model])

    return replace(
        schedule,
        actions=tuple(tuple(left(actions)) for actions in schedule.actions),
        work=tuple(replace(w, microbatches=counts[w.model]) for w in work),
    )


def why_not_fused(placements: dict[str, Placement]) -> str | None:
    """The reason why these models cannot share a stream, or None: stages and pipelines must be the same ranks
    for all of them. Sizes, layer counts and the split of a stage's ranks into tp and dp may differ."""
    (first, reference), *others = placements.items()
    for name, placement in others:
        if placement.layout.pp != reference.layout.pp:
            return f"{first} has pp={reference.layout.pp} and {name} has pp={placement.layout.pp}"
        for stage in range(reference.layout.pp):
            if _stage_ranks(placement, stage) != _stage_ranks(reference, stage):
                return f"stage {stage} of {first} and of {name} are different ranks"
        if set(placement.groups("pp")) != set(reference.groups("pp")):
            return f"the pipelines of {first} and of {name} join different ranks"
    return None


def _stage_ranks(placement: Placement, stage: int) -> set[int]:
    coords = zip(placement.layout.coords(), placement.ranks, strict=True)
    return {rank for coord, rank in coords if coord.p == stage}


def _reach(
    models: Sequence[StreamModel],
    units: Sequence[Unit],
    num_stages: int,
    cap_bytes: Sequence[float] | None,
    split: bool,
) -> list[list[int]]:
    """`reach` of `interleave`: as far ahead as the in-flight count, the bytes and the neighbours allow."""
    sizes = {m.name: m.activation_bytes for m in models}
    if split:  # so that the cap holds at least where no weights' gradients wait
        sizes = {m.name: tuple(map(max, *_sizes(m))) for m in models}
    reach = []
    for stage in range(num_stages):
        row = [min(j + num_stages - stage, len(units)) for j in range(len(units))]
        if cap_bytes is not None:
            held = [sizes[model][stage] for model, _ in units]
            row = list(map(min, row, _fits(units, held, cap_bytes[stage], stage)))
        reach.append(list(map(min, row, reach[-1])) if reach else row)
    for stage in reversed(range(num_stages - 1)):
        reach[stage] = [
            min(mine, after + 1) for mine, after in zip(reach[stage], reach[stage + 1], strict=True)
        ]
    return reach


def _sizes(model: StreamModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes per stage before a split backward and between its parts."""
    return model.activation_bytes, model.deferred_bytes or model.activation_bytes


def _behind(
    models: Sequence[StreamModel],
    units: Sequence[Unit],
    reach: Sequence[Sequence[int]],
    cap_bytes: Sequence[float] | None,
) -> list[int]:
    """`behind` of `interleave`: s on stage s, or what the bytes allow."""
    behind = list(range(len(reach)))
    if cap_bytes is None:
        return behind
    weight, deferred = ({m.name: _sizes(m)[part] for m in models} for part in (0, 1))
    for s, row in enumerate(reach):
        while behind[s]:
            (passes,) = interleave(units, [row], [{}], [behind[s]])
            if most_held(passes, s, weight, deferred) <= cap_bytes[s]:
                break
            behind[s] -= 1
    return behind


def _fits(units: Sequence[Unit], held: Sequence[float], cap: float, stage: int) -> list[int]:
    """For every unit the end of the longest run from it on that the cap holds."""
    ends = []
    end, total = 0, 0.0
    for j, (model, _) in enumerate(units):
        if held[j] > cap:
            raise UserError(
                f"one micro-batch of {model} holds {held[j]:.0f} bytes on stage {stage}, the cap is"
                f" {cap:.0f}: use smaller micro-batches or a larger cap"
            )
        while end < len(units) and total + held[end] <= cap:
            total += held[end]
            end += 1
        ends.append(end)
        total -= held[j]
    return ends
