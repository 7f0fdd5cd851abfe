"""Whether the models of training, or of inference, share a pipeline, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from puzzle.engine.fusion import Pass, Stream
from puzzle.engine.runtime import ModelRuntime, StageResult
from puzzle.plan.affinity import (
    Build,
    Part,
    apart,
    candidate,
    choose,
    estimate,
    inference_candidates,
    training_candidates,
)
from puzzle.plan.cost import CostTable
from puzzle.plan.fused import StreamModel, fused_1f1b, fused_forward, stretched, why_not_fused
from puzzle.sections import Fuse


class Sharing:
    """Runs the passes of several models, apart or in streams. Alike on every rank.

    `possible`: the placements allow one stream of all, whatever `fuse` says. `undecided` as long as `auto`
    waits for `decide`; until then models run apart. `parts` run one after the other; their orders are
    patterns, for any numbers of micro-batches.
    """

    def __init__(self, fuse: Fuse, runtimes: Sequence[ModelRuntime]) -> None:
        """UserError with the reason if `fuse` is true and the placements do not allow it."""
        self.runtimes = {runtime.name: runtime for runtime in runtimes}
        names, several = tuple(self.runtimes), len(runtimes) > 1
        self.possible = several and why_not_fused({r.name: r.placement for r in runtimes}) is None
        self.undecided = fuse == "auto" and self.possible
        self.parts = tuple(Part((name,)) for name in names)
        self._streams: dict[tuple[str, ...], Stream] = {}
        self._counts: dict[str, int] = {}
        if several and fuse is True:
            self.parts = (Part(names),)
            self._streams[names] = Stream(runtimes)

    def train(self, passes: Sequence[Pass]) -> list[StageResult]:
        """An optimizer step of every model; results in the order of `passes`."""
        return self._run(passes, train=True)

    def infer(self, passes: Sequence[Pass]) -> list[StageResult]:
        """Forward passes of every model; results in the order of `passes`."""
        return self._run(passes, train=False)

    def _run(self, passes: Sequence[Pass], train: bool) -> list[StageResult]:
        self._counts = {p.runtime.name: p.most for p in passes}
        results: dict[str, StageResult] = {}
        for part in self.parts:
            members = [p for p in passes if p.runtime.name in part.order]
            if len(members) == 1:
                (p,) = members
                run = p.runtime.train if train else p.runtime.infer
                results[p.runtime.name] = run(p.batches, p.finish)
                continue
            counts = {p.runtime.name: p.most for p in members}
            if tuple(counts) not in self._streams:
                self._streams[tuple(counts)] = Stream([p.runtime for p in members])
            stream, order = self._streams[tuple(counts)], stretched(part.order, counts)
            found = stream.train(members, order, part.defer) if train else stream.infer(members, order)
            results |= zip(counts, found, strict=True)
        return [results[p.runtime.name] for p in passes]

    @property
    def shared(self) -> bool:
        """Whether any models share a stream now."""
        return any(len(set(part.order)) > 1 for part in self.parts)

    @property
    def stages(self) -> int:
        """Of the pipeline that could be shared."""
        return next(iter(self.runtimes.values())).placement.layout.pp

    def _models(self) -> list[StreamModel]:
        return [
            StreamModel(name, self._counts[name], tied=runtime.spec.tied and self.stages > 1)
            for name, runtime in self.runtimes.items()
        ]

    def expected(self, cost: CostTable, train: bool) -> dict[str, float]:
        """Seconds of what ran last, simulated with `cost`: `apart`, and `fused` as it is set, or else in one
        stream of one model after the other."""
        models = self._models()
        split = any(runtime.split_backward for runtime in self.runtimes.values())
        build: Build = partial(fused_1f1b, split=split) if train else fused_forward
        fused = []
        for part in self.parts if self.shared else (Part(tuple(self.runtimes)),):
            counts = {m.name: m.microbatches for m in models if m.name in part.order}
            fused.append(Part(stretched(part.order, counts), part.defer))
        return {
            name: estimate(candidate(name, parts, models, self.stages, build), cost).seconds
            for name, parts in (("apart", apart(models)), ("fused", fused))
        }

    def decide(self, cost: CostTable, train: bool) -> bool:
        """Take what simulation with `cost`, measured apart, finds fastest (`puzzle plan fuse` shows the same
        candidates); whether models share from now on."""
        models = self._models()
        if train:
            candidates = training_candidates(models, self.stages, cost)
        else:
            candidates = inference_candidates(models, self.stages)
        self.parts = choose(candidates, cost)[0].candidate.parts
        self.undecided = False
        return self.shared
