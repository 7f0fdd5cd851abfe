"""Schedules of one model or several in one pipeline: 1F1B training and forward-only inference.

Several models make one sequence of micro-batches, in any order that keeps each model's own: the next model
fills the pipeline while the one before drains. With P stages, M micro-batches of each of two models and equal
costs that takes 2M + P - 1 slots of forward and backward instead of 2(M + P - 1), with the same gradients.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from puzzle.errors import UserError
from puzzle.plan.layout import Placement
from puzzle.plan.pipeline.actions import Action, Channel, Op, Payload, PipelineSpec, Schedule
from puzzle.plan.pipeline.transfers import TransferBuilder, pipeline_flow

Order = Literal["sequential", "alternating"] | Sequence[str]
"""One model after the other, evenly mixed, or spelled out: the model of every place in the pipeline."""

Unit = tuple[str, int]
"""A micro-batch of a model."""


@dataclass(frozen=True)
class PipelineModel:
    """A model in a pipeline. `microbatches` are those of the replica with most of them, `own` those of the
    replica that the schedule is for (None: as many). `tied`: its embeddings are, see `PipelineSpec`."""

    name: str
    microbatches: int
    tied: bool = False
    own: int | None = None

    @property
    def skipped(self) -> int:
        """How many micro-batches this replica has fewer."""
        return 0 if self.own is None else self.microbatches - self.own


def one_f_one_b(
    models: Sequence[PipelineModel],
    num_stages: int,
    order: Order = "sequential",
    *,
    optimizer: bool = True,
    split: bool = False,
    defer: int = 1,
) -> Schedule:
    """Training: one forward, one backward. Three stages, four micro-batches, forwards as long as backwards:

        stage 0   F0 F1 F2  .  . B0 F3 B1  . B2  . B3
        stage 1    . F0 F1  . B0 F2 B1 F3 B2  . B3
        stage 2    .  . F0 B0 F1 B1 F2 B2 F3 B3
                  warm-up  |   steady     | cool-down

    For M micro-batches (M + P - 1)(f + b) seconds with equal costs and free transfers. Stage s holds
    min(P - s, M) of them between forward and backward, of all models together.

    With `split` (of several stages) a backward B is two passes: I, whose result the stage before awaits, and
    W, the gradients of weights, for which nobody waits. W follows s units later on stage s, where the drain
    leaves it idle (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", schedule ZB-H1):

        stage 0   F0 F1 F2  .  . I0 W0 F3 I1 W1 I2 W2 I3 W3
        stage 1    . F0 F1  . I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        stage 2    .  . F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    That takes M (f + b) + (P - 1)(f + b - 2w) seconds, if w is at most the rest of b and at most f. A stage
    then holds P micro-batches, as the first does anyway.

    `optimizer` adds the optimizer's actions, `defer`: see `optimizer_slots`. A replica with fewer
    micro-batches leaves out each model's first ones: pipelines beside each other share collectives, and so
    keep one order of last backwards, with which reductions start, and of all that follows. UserError if
    `order` does not fit.
    """
    if any(m.own == 0 for m in models):
        raise ValueError(f"a replica that trains needs a micro-batch of every model: {models}")
    units = microbatch_order(models, order)
    split = split and num_stages > 1
    tied = {m.name for m in models if m.tied}
    passes = []
    for stage in range(num_stages):
        slots = optimizer_slots(units, stage, num_stages, defer, tied, split) if optimizer else {}
        passes.append(_interleaved(units, stage, num_stages, split, slots))
    specs = tuple(
        PipelineSpec(m.name, m.microbatches, backward=True, optimizer=optimizer, tied=m.tied, split=split)
        for m in models
    )
    return _schedule("1f1b" if len(models) == 1 else "fused 1f1b", models, passes, specs)


def in_flight(num_stages: int, stage: int, microbatches: int, split: bool = False) -> tuple[int, int]:
    """What `one_f_one_b` keeps at most on a stage, of so many micro-batches of all its models: those before
    their backward, and beside them those whose weights' gradients are yet to come."""
    before = min(num_stages - stage, microbatches)
    return before, min(stage, microbatches - before) if split else 0


def forward_only(models: Sequence[PipelineModel], num_stages: int, order: Order = "sequential") -> Schedule:
    """Inference: every micro-batch forward. For M of all models together (M + P - 1) f seconds with equal
    costs and free transfers. Two models a and c, three stages:

        stage 0   a0 a1 c0 c1
        stage 1    . a0 a1 c0 c1
        stage 2    .  . a0 a1 c0 c1
    """
    passes = [Action(Op.FORWARD, *unit) for unit in microbatch_order(models, order)]
    specs = tuple(PipelineSpec(m.name, m.microbatches) for m in models)
    name = "forward" if len(models) == 1 else "fused forward"
    return _schedule(name, models, [passes] * num_stages, specs)


def pipeline_channels(num_stages: int, backward: bool) -> tuple[Channel, ...]:
    """Every channel of such a schedule, also of those that a replica without micro-batches does not use."""
    hops = [Channel(s, s + 1, Payload.ACTIVATION) for s in range(num_stages - 1)]
    back = [Channel(s + 1, s, Payload.GRADIENT) for s in range(num_stages - 1)] if backward else []
    return tuple(sorted(hops + back))


def microbatch_order(models: Sequence[PipelineModel], order: Order) -> list[Unit]:
    """The micro-batches of all models in the order of their forwards. UserError if an order spelled out does
    not fit the models."""
    counts = {m.name: m.microbatches for m in models}
    if order == "sequential":
        return [(m.name, k) for m in models for k in range(m.microbatches)]
    if order == "alternating":
        # Every model's micro-batches lie evenly spread; on ties the first model leads.
        places = [
            ((k + 0.5) / m.microbatches, i, k) for i, m in enumerate(models) for k in range(m.microbatches)
        ]
        return [(models[i].name, k) for _, i, k in sorted(places)]
    if Counter(order) != counts:
        raise UserError(f"the order has {dict(Counter(order))} micro-batches, the models have {counts}")
    seen: Counter[str] = Counter()
    units = []
    for name in order:
        units.append((name, seen[name]))
        seen[name] += 1
    return units


def stretched(order: Sequence[str], counts: Mapping[str, int]) -> tuple[str, ...]:
    """The same mix of models for other numbers of micro-batches: a micro-batch takes the place of the one
    that is as far in its model's share of `order`; on ties the first model of `counts` leads."""
    places: list[tuple[float, int, int, str]] = []
    for i, (name, count) in enumerate(counts.items()):
        old = [place for place, model in enumerate(order) if model == name]
        shares = ((k + 0.5) * len(old) / count - 0.5 for k in range(count))
        places += [(_place(old, share), i, k, name) for k, share in enumerate(shares)]
    return tuple(name for *_, name in sorted(places))


def _place(places: Sequence[int], index: float) -> float:
    """Where `index` lies among evenly numbered places, on the line through the two next to it; beyond the
    ends, too, so that what alternates goes on alternating."""
    if len(places) == 1:
        return places[0]
    low = min(max(math.floor(index), 0), len(places) - 2)
    return places[low] + (index - low) * (places[low + 1] - places[low])


def why_not_fused(placements: Mapping[str, Placement]) -> str | None:
    """The reason why these models cannot share a pipeline, or None: stages and pipelines must be the same
    ranks for all of them. Sizes, layer counts and the split of a stage's ranks into tp and dp may differ."""
    if not placements:
        return None
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


def _interleaved(
    units: Sequence[Unit], stage: int, num_stages: int, split: bool, slots: Mapping[int, list[Action]]
) -> list[Action]:
    """The passes of a stage; `slots[j]` follows the backward of unit j.

    P - 1 - s forwards warm up, then a forward and a backward take turns, then the backwards left cool down.
    Forwards and backwards both keep the order of units, and no stage is further ahead of its backwards than
    the stage before lets it be: free of deadlock.
    """
    ahead, last = num_stages - 1 - stage, len(units) - 1
    passes = [Action(Op.FORWARD, *unit) for unit in units[:ahead]]
    weights_done = 0
    for j, unit in enumerate(units):
        if j + ahead <= last:
            passes.append(Action(Op.FORWARD, *units[j + ahead]))
        passes.append(Action(Op.BACKWARD_INPUT if split else Op.BACKWARD, *unit))
        if split:
            due = len(units) if j == last else max(0, j + 1 - stage)
            passes.extend(Action(Op.BACKWARD_WEIGHT, *u) for u in units[weights_done:due])
            weights_done = due
        passes.extend(slots.get(j, ()))
    return passes


def optimizer_slots(
    units: Sequence[Unit],
    stage: int,
    num_stages: int,
    defer: int,
    tied: Collection[str],
    split: bool,
) -> dict[int, list[Action]]:
    """Where the optimizers of the models act on a stage: after which unit's backward. Of two models a and c,
    with a reduction r, a norm n, a step S, a gather g, and `-` where each is awaited (at the latest):

        stage 0   .. Ba2 ra  Fc2 Bc0 -na  Fc3 Bc1 -Sa ga           ...  Bc4 rc -nc -Sc gc  -a -c
        stage 1   .. Ba2 ra  Fc1 Bc0 -na  Fc2 Bc1  Fc3 Bc2 -Sa ga  ...  Bc4 rc -nc -Sc gc  -a -c
                     a ends |      beside the micro-batches of c       | c ends

    A model's gradient reduction starts with its last backward; `defer` units later it is waited for and
    the norms start to be summed. That sum is over when the first stage has come so far. A backward moves
    one stage in at most the time that a unit takes, so the step comes `stage + defer` units later still,
    and costs no waiting; its gather ends with the schedule. The reduction of a model with `tied` embeddings
    joins the first and the last stage, which has to wait for the first. What finds no units left comes at
    the end, in the order in which models end. With `split` backwards a model's gradients are whole s units
    later on stage s, and everywhere after P - 1.
    """
    last, most = len(units) - 1, num_stages - 1 if split else 0
    ends = {model: j for j, (model, _) in enumerate(units)}
    slots: defaultdict[int, list[Action]] = defaultdict(list)
    joined = False
    for model, end in sorted(ends.items(), key=lambda item: item[1]):
        joined = joined or model in tied  # norms are summed in one order, so later models wait as well
        lag = num_stages - 1 if joined else stage
        whole = min(last, end + (stage if split else 0))
        end += most
        norm = end + defer + (lag if joined and stage == num_stages - 1 else 0)
        # First in its slot: it needs nothing but the backward just done, others' waits may hold up the stage.
        slots[whole].insert(0, Action(Op.REDUCE, model))
        slots[min(norm, last)] += [Action(op, model) for op in (Op.WAIT_REDUCE, Op.NORM)]
        step = end + lag + 2 * defer
        slots[min(step, last)] += [Action(op, model) for op in (Op.WAIT_NORM, Op.STEP, Op.GATHER)]
    slots[last] += [Action(Op.WAIT_GATHER, model) for model in ends]
    return dict(slots)


def _schedule(
    name: str,
    models: Sequence[PipelineModel],
    passes: Sequence[Sequence[Action]],
    specs: tuple[PipelineSpec, ...],
) -> Schedule:
    """A schedule from the passes of every stage: without micro-batches that the replica has not, with
    transfers. ValueError for impossible numbers."""
    num_stages = len(passes)
    if num_stages < 1 or any(m.microbatches < 1 for m in models):
        raise ValueError(f"{name}: stages and micro-batches must be at least 1")
    skipped = {m.name: m.skipped for m in models}
    if any(skip < 0 or skip > m.microbatches for m, skip in zip(models, skipped.values(), strict=True)):
        raise ValueError(
            f"{name}: a replica has at most as many micro-batches as the one with most: {models}"
        )
    flow = pipeline_flow(num_stages)
    actions = []
    for stage, order in enumerate(passes):
        transfers = TransferBuilder(stage, flow)
        actions.append((*transfers.part(_left(order, skipped)), *transfers.drain()))
    owed = tuple(replace(w, microbatches=w.microbatches - skipped[w.model]) for w in specs)
    return Schedule(name, num_stages, tuple(actions), owed)


def _left(actions: Sequence[Action], skipped: Mapping[str, int]) -> list[Action]:
    """Without every model's first `skipped` micro-batches; the others are numbered from 0."""
    if not any(skipped.values()):
        return list(actions)
    left = []
    for action in actions:
        number = action.microbatch - skipped[action.model]
        if action.microbatch < 0:
            left.append(action)
        elif number >= 0:
            left.append(replace(action, microbatch=number))
    return left
