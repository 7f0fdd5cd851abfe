"""The way through the stages for one model or several: plan their micro-batches, then execute the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.stage import Gradients, OutputFn, StageRun
from puzzle.errors import UserError
from puzzle.model.packing import PackedBatch
from puzzle.plan.pipeline.actions import Schedule
from puzzle.plan.pipeline.schedules import (
    Order,
    PipelineModel,
    forward_only,
    one_f_one_b,
    pipeline_channels,
    why_not_fused,
)
from puzzle.plan.simulate.check import checked


@dataclass(frozen=True)
class PipelineInput:
    """One model's `batches`, and `output_fn`, which makes a micro-batch's loss (training) or output of final
    hidden states on the last stage.

    `most` is the number of micro-batches of the replica that has most of them, equal on every rank; None: all
    have as many.
    """

    model: ModelRuntime
    batches: Sequence[PackedBatch]
    output_fn: OutputFn
    most: int | None = None


@dataclass(frozen=True)
class PipelineOutput:
    """What a model's micro-batches gave: losses or outputs in order (last stage alone), and the schedule that
    ran, the same for all models of a run."""

    schedule: Schedule
    results: list[Tensor]


class Pipeline:
    """Models that share stages. All ranks make the same calls in the same order."""

    def __init__(self, models: Sequence[ModelRuntime]) -> None:
        """UserError with the reason if their placements do not allow it."""
        reason = why_not_fused({model.name: model.placement for model in models})
        if reason:
            raise UserError(f"{' and '.join(m.name for m in models)} cannot share a pipeline: {reason}")
        self._executor = models[0].executor
        self._stages = models[0].placement.layout.pp

    def train(
        self,
        inputs: Sequence[PipelineInput],
        order: Order = "sequential",
        defer: int = 1,
        *,
        gradients: Sequence[Gradients] | None = None,
    ) -> list[PipelineOutput]:
        """Forward and backward passes of all models under one 1F1B, and an optimizer step of each among them.

        A model's losses, summed over micro-batches and replicas, are its minibatch's. Weights are bitwise
        those of one model after the other, whatever `order` and `defer` (see `one_f_one_b`). `gradients`,
        one for every input, take what the optimizers would: then nothing is stepped.
        """
        split = any(i.model.split_backward for i in inputs)
        schedule = checked(
            one_f_one_b,
            self._models(inputs),
            self._stages,
            order if isinstance(order, str) else tuple(order),
            optimizer=gradients is None,
            split=split,
            defer=defer,
        )
        taking = [i.model.optimizer for i in inputs] if gradients is None else gradients
        runs = [
            StageRun(i.model.stage, i.batches, i.output_fn, own)
            for i, own in zip(inputs, taking, strict=True)
        ]
        return self._run("training", schedule, inputs, runs)

    def infer(self, inputs: Sequence[PipelineInput], order: Order = "sequential") -> list[PipelineOutput]:
        """Forward passes of all models without gradients."""
        order = order if isinstance(order, str) else tuple(order)
        schedule = checked(forward_only, self._models(inputs), self._stages, order)
        runs = [StageRun(i.model.stage, i.batches, i.output_fn) for i in inputs]
        return self._run("inference", schedule, inputs, runs)

    def _models(self, inputs: Sequence[PipelineInput]) -> tuple[PipelineModel, ...]:
        return tuple(
            PipelineModel(
                i.model.name,
                len(i.batches) if i.most is None else i.most,
                tied=i.model.spec.tied and self._stages > 1,
                own=len(i.batches),
            )
            for i in inputs
        )

    def _run(
        self, kind: str, schedule: Schedule, inputs: Sequence[PipelineInput], runs: Sequence[StageRun]
    ) -> list[PipelineOutput]:
        """Called `training.actor+critic` or the like in the log."""
        models = {i.model.name: run for i, run in zip(inputs, runs, strict=True)}
        channels = pipeline_channels(self._stages, backward=kind == "training")
        execution = self._executor.begin(f"{kind}.{'+'.join(models)}", channels)
        execution.run(schedule, models)
        execution.finish(schedule)
        return [PipelineOutput(schedule, [r for r in run.results if r is not None]) for run in runs]
