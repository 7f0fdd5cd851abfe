"""Schedules of one model, which most tests draw their numbers from."""

from __future__ import annotations

from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.actions import Schedule
from puzzle.plan.pipeline.schedules import PipelineModel


def one_f_one_b(
    num_stages: int,
    microbatches: int,
    model: str = "actor",
    *,
    optimizer: bool = False,
    tied: bool = False,
    split: bool = False,
) -> Schedule:
    """1F1B, without the optimizer's actions where nothing else is said."""
    models = [PipelineModel(model, microbatches, tied)]
    return schedules.one_f_one_b(models, num_stages, optimizer=optimizer, split=split)


def forward_only(num_stages: int, microbatches: int, model: str = "actor") -> Schedule:
    """Forwards alone."""
    return schedules.forward_only([PipelineModel(model, microbatches)], num_stages)
