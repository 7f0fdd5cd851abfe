"""Seconds per action: what a simulation needs to know about a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import COLLECTIVES, COMPUTE, Action, Op, Schedule

Seconds = float | tuple[float | None, ...]
"""The same for every stage, or one number per stage (of a transfer: of the sending stage), None where
unknown."""


@dataclass(frozen=True)
class CostTable:
    """`seconds[model][what]`, where `what` is a compute op, a collective's start op, or a payload;
    `start norm` and the like are what the start of a collective computes on the stage itself."""

    seconds: Mapping[str, Mapping[str, Seconds]]

    def of(self, stage: int, action: Action) -> float:
        """Seconds that a compute action, a collective or a transfer (asked as its SEND) takes. UserError
        if unknown."""
        what = str(action.payload if action.op is Op.SEND else action.op)
        seconds = self._find(stage, action.model, what)
        if seconds is None:
            who = f"{what} of {action.model} on stage {stage}"
            raise UserError(f"no cost of {who}: measure it or add it to the costs")
        return seconds

    def starting(self, stage: int, action: Action) -> float:
        """Seconds for which the start of a collective occupies the stage; 0 where the table has none."""
        return self._find(stage, action.model, starts(action.op)) or 0.0

    def knows(self, models: Iterable[str], *ops: Op) -> bool:
        """Whether every model has costs of all these."""
        return all(op in self.seconds.get(model, {}) for model in models for op in ops)

    def require(self, schedules: Iterable[Schedule]) -> None:
        """UserError naming every cost that a simulation of these would ask for and that is unknown."""
        stages: dict[tuple[str, str], list[int]] = {}
        for schedule in schedules:
            for stage, actions in enumerate(schedule.actions):
                for action in actions:
                    if action.op in COMPUTE or action.op in COLLECTIVES or action.op is Op.SEND:
                        what = str(action.payload if action.op is Op.SEND else action.op)
                        if self._find(stage, action.model, what) is None:
                            named = stages.setdefault((action.model, what), [])
                            named += [stage] if stage not in named else []
        lacking: dict[str, list[str]] = {}
        for (model, what), where in stages.items():
            known = self.seconds.get(model, {}).get(what) is not None
            place = f" on stage {', '.join(map(str, where))}" if known else ""
            lacking.setdefault(model, []).append(what + place)
        if lacking:
            costs = "; ".join(f"{model}: {', '.join(names)}" for model, names in lacking.items())
            raise UserError(f"no cost of {costs}; measure them or add them to the costs")

    def _find(self, stage: int, model: str, what: str) -> float | None:
        seconds = self.seconds.get(model, {}).get(what)
        if isinstance(seconds, tuple):
            return seconds[stage] if stage < len(seconds) else None
        return seconds


def starts(op: Op) -> str:
    """What the computing part of a collective's start is called in tables and traces."""
    return f"start {op}"
