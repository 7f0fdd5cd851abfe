"""Schedules of one model: 1F1B training and forward-only inference, for any P stages and M micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle.plan.schedule import Action, Op, Schedule, Work
from puzzle.plan.wiring import Wiring, pipeline_flow

Unit = tuple[str, int]
"""A micro-batch of a model."""


def in_flight_cap(num_stages: int, stage: int, microbatches: int) -> int:
    """Micro-batches that 1F1B holds on a stage between forward and backward."""
    return min(num_stages - stage, microbatches)


def one_f_one_b(
    num_stages: int, microbatches: int, model: str = "actor", *, optimizer: bool = False, prefetch: int = 1
) -> Schedule:
    """One forward, one backward: (M + P - 1)(f + b) seconds with equal costs and free transfers, holding
    `in_flight_cap` micro-batches. `optimizer` ends it with the optimizer's actions."""
    units = [(model, m) for m in range(microbatches)]
    reach = [[min(j + num_stages - s, microbatches) for j in range(microbatches)] for s in range(num_stages)]
    passes = interleave(units, reach)
    if optimizer:
        passes = [stage + optimizer_tail(model) for stage in passes]
    work = Work(model, microbatches, backward=True, optimizer=optimizer)
    return pipeline("1f1b", passes, (work,), prefetch)


def forward_only(num_stages: int, microbatches: int, model: str = "actor", *, prefetch: int = 1) -> Schedule:
    """Every micro-batch forward: (M + P - 1) f seconds with equal costs and free transfers."""
    passes = [[Action(Op.FORWARD, model, m) for m in range(microbatches)] for _ in range(num_stages)]
    return pipeline("forward", passes, (Work(model, microbatches),), prefetch)


def interleave(units: Sequence[Unit], reach: Sequence[Sequence[int]]) -> list[list[Action]]:
    """The passes of every stage for a stream of units; forwards and backwards both keep the stream's order.

    `reach[s][j]` is how many forwards stage s has done before its backward of unit j: more than j, never
    falling with j, never rising with s. The last makes the stream deadlock-free: no stage waits for a forward
    that the stage before withholds until its next backward.
    """
    passes = []
    for row in reach:
        done = 0
        stage: list[Action] = []
        for j, (model, microbatch) in enumerate(units):
            stage.extend(Action(Op.FORWARD, *unit) for unit in units[done : row[j]])
            done = max(done, row[j])
            stage.append(Action(Op.BACKWARD, model, microbatch))
        passes.append(stage)
    return passes


def optimizer_tail(model: str) -> list[Action]:
    """The optimizer's actions when nothing is left to overlap them with."""
    ops = (Op.REDUCE, Op.WAIT_REDUCE, Op.NORM, Op.WAIT_NORM, Op.STEP, Op.GATHER, Op.WAIT_GATHER)
    return [Action(op, model) for op in ops]


def pipeline(
    name: str, passes: Sequence[Sequence[Action]], work: tuple[Work, ...], prefetch: int
) -> Schedule:
    """A schedule from the passes of every stage of a plain pipeline. ValueError for impossible numbers."""
    num_stages = len(passes)
    if num_stages < 1 or any(w.microbatches < 1 for w in work) or prefetch < 0:
        raise ValueError(f"{name}: stages and micro-batches must be at least 1, prefetch at least 0")
    flow = pipeline_flow(num_stages)
    actions = []
    for stage, order in enumerate(passes):
        wiring = Wiring(stage, flow, prefetch)
        actions.append((*wiring.part(order), *wiring.drain()))
    return Schedule(name, num_stages, tuple(actions), work)
