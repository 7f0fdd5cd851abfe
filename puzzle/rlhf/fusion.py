"""Whether the models of training, or of inference, share a pipeline, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from puzzle.config.sections import Fuse
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput, PipelineOutput
from puzzle.plan.pipeline.schedules import PipelineModel, forward_only, one_f_one_b, stretched, why_not_fused
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.search import (
    Build,
    FusionGroup,
    apart,
    candidate,
    choose_fusion,
    estimate,
    inference_candidates,
    training_candidates,
)

MakePipeline = Callable[[Sequence[ModelRuntime]], Pipeline]


class FusedPipeline:
    """Runs several models, in one pipeline or one after the other. Alike on every rank.

    `can_fuse`: the placements allow one pipeline for all, whatever `fuse` says. `undecided` as long as `auto`
    waits for `decide`; until then models run apart. `groups` run one after the other; their orders are
    patterns, for any numbers of micro-batches.
    """

    def __init__(
        self, fuse: Fuse, models: Sequence[ModelRuntime], make_pipeline: MakePipeline = Pipeline
    ) -> None:
        """UserError with the reason if `fuse` is true and the placements do not allow it."""
        self.models = {model.name: model for model in models}
        self._make = make_pipeline
        names, several = tuple(self.models), len(models) > 1
        self.can_fuse = several and why_not_fused({m.name: m.placement for m in models}) is None
        self.undecided = fuse == "auto" and self.can_fuse
        self.groups = tuple(FusionGroup((name,)) for name in names)
        self._pipelines: dict[tuple[str, ...], Pipeline] = {}
        self._counts: dict[str, int] = {}
        if several and fuse is True:
            self.groups = (FusionGroup(names),)
            self._pipeline(names)

    def train(self, inputs: Sequence[PipelineInput]) -> list[PipelineOutput]:
        """An optimizer step of every model; outputs in the order of `inputs`."""
        return self._run(inputs, train=True)

    def infer(self, inputs: Sequence[PipelineInput]) -> list[PipelineOutput]:
        """Forward passes of every model; outputs in the order of `inputs`."""
        return self._run(inputs, train=False)

    def _run(self, inputs: Sequence[PipelineInput], train: bool) -> list[PipelineOutput]:
        self._counts = {i.model.name: len(i.batches) if i.most is None else i.most for i in inputs}
        outputs: dict[str, PipelineOutput] = {}
        for group in self.groups:
            members = [i for i in inputs if i.model.name in group.order]
            counts = {i.model.name: self._counts[i.model.name] for i in members}
            pipeline = self._pipeline(tuple(counts))
            order = stretched(group.order, counts) if len(counts) > 1 else "sequential"
            run = partial(pipeline.train, defer=group.defer) if train else pipeline.infer
            outputs |= zip(counts, run(members, order), strict=True)
        return [outputs[i.model.name] for i in inputs]

    def _pipeline(self, names: tuple[str, ...]) -> Pipeline:
        if names not in self._pipelines:
            self._pipelines[names] = self._make([self.models[name] for name in names])
        return self._pipelines[names]

    @property
    def fused(self) -> bool:
        """Whether any models share a pipeline now."""
        return any(len(set(group.order)) > 1 for group in self.groups)

    @property
    def num_stages(self) -> int:
        """Of the pipeline that could be shared."""
        return next(iter(self.models.values())).placement.layout.pp

    def _planned(self) -> list[PipelineModel]:
        return [
            PipelineModel(name, self._counts[name], tied=model.spec.tied and self.num_stages > 1)
            for name, model in self.models.items()
        ]

    def simulated(self, cost: CostTable, train: bool) -> dict[str, float]:
        """Seconds of what ran last, simulated with `cost`: `apart`, and `fused` as it is set, or else in one
        pipeline, one model after the other."""
        models = self._planned()
        split = any(model.split_backward for model in self.models.values())
        build: Build = partial(one_f_one_b, split=split) if train else forward_only
        fused = []
        for group in self.groups if self.fused else (FusionGroup(tuple(self.models)),):
            counts = {m.name: m.microbatches for m in models if m.name in group.order}
            fused.append(FusionGroup(stretched(group.order, counts), group.defer))
        return {
            name: estimate(candidate(name, groups, models, self.num_stages, build), cost).seconds
            for name, groups in (("apart", apart(models)), ("fused", fused))
        }

    def decide(self, cost: CostTable, train: bool) -> bool:
        """Take what simulation with `cost`, measured apart, finds fastest (`puzzle plan fuse` shows the same
        candidates); whether models share a pipeline from now on."""
        models = self._planned()
        if train:
            candidates = training_candidates(models, self.num_stages, cost)
        else:
            candidates = inference_candidates(models, self.num_stages)
        self.groups = choose_fusion(candidates, cost)[0].candidate.groups
        self.undecided = False
        return self.fused
