"""Several models in one stream of passes: the pipeline does not run empty between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.engine.runtime import ModelRuntime, StageResult
from puzzle.engine.stage import Finish, StageRun
from puzzle.errors import UserError
from puzzle.model.packing import PackedBatch
from puzzle.plan.check import check
from puzzle.plan.fused import Order, StreamModel, fused_1f1b, fused_forward, shortened, why_not_fused
from puzzle.plan.schedule import Schedule


@dataclass(frozen=True)
class Pass:
    """What one model does in a stream: its `batches`, and `finish` as in `ModelRuntime.train` and `infer`.

    `most` is the number of micro-batches of the replica that has most of them, equal on every rank.
    """

    runtime: ModelRuntime
    batches: Sequence[PackedBatch]
    finish: Finish
    most: int


class Stream:
    """Models that share a pipeline. All ranks make the same calls in the same order."""

    def __init__(self, runtimes: Sequence[ModelRuntime]) -> None:
        """UserError with the reason if their placements do not allow it."""
        reason = why_not_fused({runtime.name: runtime.placement for runtime in runtimes})
        if reason:
            raise UserError(f"{' and '.join(r.name for r in runtimes)} cannot share a pipeline: {reason}")
        self._runner = runtimes[0].runner
        self._schedules: dict[tuple[object, ...], Schedule] = {}

    def train(self, passes: Sequence[Pass], order: Order = "sequential", defer: int = 1) -> list[StageResult]:
        """Forward and backward passes of all models as one 1F1B stream, an optimizer step of each among them.

        Bitwise the weights that `ModelRuntime.train` of one model after the other gives. `defer`: see
        `fused_1f1b`.
        """
        return self._run(passes, order, defer)

    def infer(self, passes: Sequence[Pass], order: Order = "sequential") -> list[StageResult]:
        """Forward passes of all models without gradients, one behind the other."""
        return self._run(passes, order, None)

    def _run(self, passes: Sequence[Pass], order: Order, defer: int | None) -> list[StageResult]:
        """Trains if `defer` is given."""
        schedule = self._schedule(passes, order, defer)
        runs = {
            p.runtime.name: StageRun(
                p.runtime.stage, p.batches, p.finish, None if defer is None else p.runtime.optimizer
            )
            for p in passes
        }
        self._runner.run(schedule, runs)
        return [StageResult(schedule, [r for r in run.results if r is not None]) for run in runs.values()]

    def _schedule(self, passes: Sequence[Pass], order: Order, defer: int | None) -> Schedule:
        """Made for the replicas with most micro-batches, cut to what this one has, checked, and kept."""
        own = {p.runtime.name: len(p.batches) for p in passes}
        most = tuple(p.most for p in passes)
        split = any(p.runtime.split_backward for p in passes)
        key = (defer, split, order if isinstance(order, str) else tuple(order), most, *own.items())
        if key not in self._schedules:
            stages = passes[0].runtime.placement.layout.pp
            models = [
                StreamModel(p.runtime.name, p.most, tied=p.runtime.spec.tied and stages > 1) for p in passes
            ]
            if defer is None:
                whole = fused_forward(models, stages, order)
            else:
                whole = fused_1f1b(models, stages, order, split=split, defer=defer)
            made = shortened(whole, own)
            if broken := check(made):
                raise RuntimeError(f"{made.name} of {', '.join(own)}: {'; '.join(broken)}")
            self._schedules[key] = made
        return self._schedules[key]
