"""Runs a schedule in virtual time, under the rules that a real execution obeys.

A stage issues its actions in order. Compute occupies the stage, as does what the start of a collective
computes (the local part of a norm). Transfers and collectives run on lanes of their own. The k-th transfer
of a channel begins when both sides have started theirs and the one before is over (rendezvous, in stream
order); the sum of norms begins when all stages have started it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from puzzle.plan.pipeline.actions import (
    COLLECTIVES,
    COMPUTE,
    STARTS,
    TRANSFERS,
    Action,
    Op,
    PipelineSpec,
    Schedule,
)
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.measured import action_span, start_span
from puzzle.plan.simulate.timeline import Span, Timeline


def simulate(schedule: Schedule, cost: CostTable) -> Timeline:
    """The schedule's timeline under the costs. ValueError for a schedule that deadlocks, UserError for a
    missing cost."""
    spans: list[Span] = []
    _run(schedule, cost, spans.append)
    return Timeline(tuple(spans))


def makespan(schedule: Schedule, cost: CostTable) -> float:
    """`simulate(...).makespan`, without the spans."""
    return _run(schedule, cost, None)


def _run(schedule: Schedule, cost: CostTable, record: Callable[[Span], None] | None) -> float:
    execution = VirtualExecution(schedule, cost.of, record, cost.starting)
    if blocked := execution.run():
        raise ValueError(f"{schedule.name} deadlocks: " + "; ".join(blocked))
    return max(execution.clock)


class _Lane:
    """A channel or a collective: what every side has started, in order, and how many of them are over."""

    def __init__(self, sides: int) -> None:
        self.starts: list[list[tuple[float, Hashable, int, Action]]] = [[] for _ in range(sides)]
        self.over = 0
        self.free_at = 0.0


class VirtualExecution:
    """One run of a schedule in virtual time; `seconds(stage, action)` is asked for compute, collectives
    and sends, `starting` for what the start of a collective computes. `clock` is how far every stage has
    come. `record` gets the spans."""

    def __init__(
        self,
        schedule: Schedule,
        seconds: Callable[[int, Action], float],
        record: Callable[[Span], None] | None = None,
        starting: Callable[[int, Action], float] = lambda stage, action: 0.0,
    ) -> None:
        self.schedule = schedule
        self.seconds, self.starting = seconds, starting
        self.clock = [0.0] * schedule.num_stages
        self._tied = {w.model for w in schedule.specs if isinstance(w, PipelineSpec) and w.tied}
        self._save = record
        self._next = [0] * schedule.num_stages
        self._ends: dict[Hashable, float] = {}
        self._lanes: dict[Hashable, _Lane] = {}

    def run(self) -> list[str]:
        """Runs to the end; gives back where every blocked stage stands (nothing if all are done)."""
        stages = range(self.schedule.num_stages)
        # Progress of one stage never undoes another's, so any order of tries ends in the same state.
        while sum(self._advance(stage) for stage in stages):
            pass
        return [
            f"stage {s} waits in {self.schedule.actions[s][self._next[s]].label}"
            for s in stages
            if self._next[s] < len(self.schedule.actions[s])
        ]

    def _advance(self, stage: int) -> bool:
        actions, first = self.schedule.actions[stage], self._next[stage]
        while self._next[stage] < len(actions) and self._issue(stage, actions[self._next[stage]]):
            self._next[stage] += 1
        return self._next[stage] > first

    def _issue(self, stage: int, action: Action) -> bool:
        """Issues an action; False if it has to wait for something that has not been started."""
        if action.op in COMPUTE:
            self._compute(stage, action_span, action, self.seconds(stage, action))
        elif action.op in TRANSFERS:
            message = action.message(stage)
            side = 0 if action.op in (Op.SEND, Op.WAIT_SEND) else 1
            if action.op in (Op.WAIT_SEND, Op.WAIT_RECV):
                return self._wait(stage, action, (message, side))
            self._start(message.channel, 2, side, stage, action, (message, side))
        elif action.op in COLLECTIVES:
            group, stages = self._collective(stage, action)
            key = (action.op, action.model, stage)
            self._compute(stage, start_span, action, self.starting(stage, action))
            self._start(group, len(stages), stages.index(stage), stage, action, key)
        else:
            return self._wait(stage, action, (STARTS[action.op], action.model, stage))
        return True

    def _collective(self, stage: int, action: Action) -> tuple[Hashable, Sequence[int]]:
        """The lane of a collective and the stages that take part in it."""
        stages = range(self.schedule.num_stages)
        if action.op is Op.NORM:
            return action.op, stages
        if action.op is Op.REDUCE and action.model in self._tied and stage in (stages[0], stages[-1]):
            return (action.op, action.model), (stages[0], stages[-1])[: len(stages)]
        return stage, (stage,)

    def _wait(self, stage: int, action: Action, key: Hashable) -> bool:
        if key not in self._ends:
            return False
        start = self.clock[stage]
        self.clock[stage] = max(start, self._ends[key])
        self._record(stage, action, start, self.clock[stage])
        return True

    def _start(
        self, group: Hashable, sides: int, side: int, stage: int, action: Action, key: Hashable
    ) -> None:
        lane = self._lanes.setdefault(group, _Lane(sides))
        lane.starts[side].append((self.clock[stage], key, stage, action))
        while all(len(starts) > lane.over for starts in lane.starts):
            begun = [starts[lane.over] for starts in lane.starts]
            start = max(lane.free_at, *(time for time, *_ in begun), 0.0)
            lane.free_at = start + max(self.seconds(s, a) for _, _, s, a in begun if a.op is not Op.RECV)
            for _, begun_key, s, a in begun:
                self._ends[begun_key] = lane.free_at
                if a.op is not Op.RECV:
                    self._record(s, a, start, lane.free_at)
            lane.over += 1

    def _compute(
        self, stage: int, span: Callable[[int, Action, float, float], Span], action: Action, seconds: float
    ) -> None:
        start = self.clock[stage]
        self.clock[stage] = start + seconds
        if self._save is not None and (seconds or action.op in COMPUTE):
            self._save(span(stage, action, start, self.clock[stage]))

    def _record(self, stage: int, action: Action, start: float, end: float) -> None:
        if self._save is not None:
            self._save(action_span(stage, action, start, end))
