"""What a schedule is measured by in tests, counted action by action."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puzzle.plan.pipeline.actions import TRANSFERS, Channel, Op, PipelineSpec, Schedule

Sizes = Mapping[str, Sequence[float]]
"""Model -> bytes of one micro-batch on every stage."""


def channels(schedule: Schedule) -> tuple[Channel, ...]:
    """Every channel in use, sorted."""
    return tuple(sorted({a.message(s).channel for s, a in schedule.walk() if a.op in TRANSFERS}))


def peak_in_flight(
    schedule: Schedule, weight: Sizes | None = None, deferred: Sizes | None = None
) -> tuple[float, ...]:
    """Per stage the most micro-batches held between forward and (all of) backward. With `weight` the most
    bytes, where `deferred` (default: `weight`) is held between both parts of a split backward. Models
    without backward hold nothing."""
    trained = {w.model for w in schedule.specs if isinstance(w, PipelineSpec) and w.backward}
    peaks = []
    for stage, actions in enumerate(schedule.actions):
        held = peak = 0.0
        for action in actions:
            if action.model not in trained:
                continue
            whole = weight[action.model][stage] if weight else 1.0
            later = deferred[action.model][stage] if deferred else whole
            held += {
                Op.FORWARD: whole,
                Op.BACKWARD: -whole,
                Op.BACKWARD_INPUT: later - whole,
                Op.BACKWARD_WEIGHT: -later,
            }.get(action.op, 0.0)
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
