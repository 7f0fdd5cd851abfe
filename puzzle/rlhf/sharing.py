"""Whether the models of training, or of inference, share a pipeline, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Literal

from puzzle.engine.fusion import Pass, Stream
from puzzle.engine.runtime import ModelRuntime, StageResult
from puzzle.plan.affinity import Candidate, choose, estimate
from puzzle.plan.cost import CostTable
from puzzle.plan.fused import StreamModel, fused_1f1b, fused_forward, why_not_fused
from puzzle.plan.pipelines import forward_only, one_f_one_b
from puzzle.plan.schedule import Schedule
from puzzle.sections import Fuse

Kind = Literal["sequential", "alternating"]


class Sharing:
    """Runs the passes of several models, apart or as one stream. Alike on every rank.

    `possible`: the placements allow a stream, whatever `fuse` says. `undecided` as long as `auto` waits for
    `decide`; until then models run apart.
    """

    def __init__(self, fuse: Fuse, runtimes: Sequence[ModelRuntime]) -> None:
        """UserError with the reason if `fuse` is true and the placements do not allow it."""
        self.runtimes = {runtime.name: runtime for runtime in runtimes}
        several = len(runtimes) > 1
        self.possible = several and why_not_fused({r.name: r.placement for r in runtimes}) is None
        self.stream = Stream(runtimes) if several and (fuse is True or (fuse and self.possible)) else None
        self.undecided = fuse == "auto" and self.possible
        self.shared = self.stream is not None and not self.undecided
        self.order = tuple(self.runtimes)
        self.kind: Kind = "sequential"
        self._counts: dict[str, int] = {}

    def train(self, passes: Sequence[Pass]) -> list[StageResult]:
        """An optimizer step of every model; results in the order of `passes`."""
        self._counts = {p.runtime.name: p.most for p in passes}
        if self.shared and self.stream is not None:
            return self._shared(self.stream.train, passes)
        return [p.runtime.train(p.batches, p.finish) for p in passes]

    def infer(self, passes: Sequence[Pass]) -> list[StageResult]:
        """Forward passes of every model; results in the order of `passes`."""
        self._counts = {p.runtime.name: p.most for p in passes}
        if self.shared and self.stream is not None:
            return self._shared(self.stream.infer, passes)
        return [p.runtime.infer(p.batches, p.finish) for p in passes]

    def _shared(
        self, run: Callable[[Sequence[Pass], Kind], list[StageResult]], passes: Sequence[Pass]
    ) -> list[StageResult]:
        ordered = sorted(passes, key=lambda p: self.order.index(p.runtime.name))
        results = {p.runtime.name: r for p, r in zip(ordered, run(ordered, self.kind), strict=True)}
        return [results[p.runtime.name] for p in passes]

    @property
    def stages(self) -> int:
        """Of the pipeline that could be shared."""
        return next(iter(self.runtimes.values())).placement.layout.pp

    def _models(self, order: Sequence[str]) -> list[StreamModel]:
        tied = {name: runtime.spec.tied and self.stages > 1 for name, runtime in self.runtimes.items()}
        return [StreamModel(name, self._counts[name], tied=tied[name]) for name in order]

    def _apart(self, train: bool) -> Candidate:
        schedules = (_alone(model, self.stages, train) for model in self._models(tuple(self.runtimes)))
        return Candidate("apart", tuple(schedules))

    def _fused(self, order: Sequence[str], kind: Kind, train: bool) -> Candidate:
        build = fused_1f1b if train else fused_forward
        return Candidate(f"{kind} {tuple(order)}", (build(self._models(order), self.stages, kind),))

    def expected(self, cost: CostTable, train: bool) -> dict[str, float]:
        """Seconds of what ran last, simulated with `cost`: `apart`, and `fused` in the order that is set."""
        fused = self._fused(self.order, self.kind, train)
        return {"apart": estimate(self._apart(train), cost).seconds, "fused": estimate(fused, cost).seconds}

    def decide(self, cost: CostTable, train: bool) -> bool:
        """Take what simulation with `cost`, measured apart, finds fastest; whether that is a stream."""
        choices: dict[str, tuple[tuple[str, ...], Kind]] = {}
        candidates = [self._apart(train)]
        kinds: tuple[Kind, ...] = ("sequential", "alternating")
        for kind in kinds:
            for order in permutations(self.runtimes):
                candidates.append(self._fused(order, kind, train))
                choices[candidates[-1].name] = order, kind
        best = choose(candidates, cost)[0].candidate.name
        self.undecided, self.shared = False, best != "apart"
        if self.shared:
            self.order, self.kind = choices[best]
        return self.shared


def _alone(model: StreamModel, stages: int, train: bool) -> Schedule:
    if train:
        return one_f_one_b(stages, model.microbatches, model.name, optimizer=True, tied=model.tied)
    return forward_only(stages, model.microbatches, model.name)
