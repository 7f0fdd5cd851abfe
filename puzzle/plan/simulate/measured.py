"""From the actions of a real run to a timeline, and from a timeline to costs.

Costs need the timelines of all ranks on one clock: a transfer takes from the end of the pass that yields
it (the receiver being ready) to the end of the receiver's wait, a collective from when its last member has
come.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from puzzle.plan.pipeline.actions import COLLECTIVES, COMPUTE, GRADIENTS, STARTS, Action, Op, Payload
from puzzle.plan.simulate.cost import CostTable, Seconds, starts
from puzzle.plan.simulate.timeline import COMPUTE_LANE, Span, Timeline

WAIT_LANE = "wait"


def action_span(row: int, action: Action, start: float, end: float) -> Span:
    """The span of an action: passes and steps on the compute lane, waits on a lane of theirs, what runs
    beside on the lane of its channel or collective. Transfers' categories end in their payload."""
    category, lane = str(action.op), str(action.op)
    if action.op in COMPUTE:
        lane = COMPUTE_LANE
    elif action.op is Op.SEND:
        category, lane = str(action.payload), f"{action.payload} to {action.peer}"
    elif action.op not in COLLECTIVES:
        category, lane = f"{action.op} {action.payload}" if action.payload else category, WAIT_LANE
    return Span(row, lane, action.label, start, end, category, action.model, action.microbatch)


def start_span(row: int, action: Action, start: float, end: float) -> Span:
    """The span of what the start of a collective computes before anything is sent, on the compute lane."""
    what = starts(action.op)
    return Span(row, COMPUTE_LANE, f"{what} {action.model}", start, end, what, action.model)


def action_spans(row: int, marks: Iterable[tuple[Action, float, float]]) -> Iterator[Span]:
    """The spans of a rank from its (action, start, end) in order. A collective runs from the end of its start
    until its wait is over; starts of transfers leave no span: their end shows only at the receiver."""
    started: dict[tuple[Op, str], tuple[Action, float]] = {}
    for action, start, end in marks:
        if action.op in COLLECTIVES:
            started[action.op, action.model] = action, end
            yield start_span(row, action, start, end)
        elif action.op not in (Op.SEND, Op.RECV):
            yield action_span(row, action, start, end)
        if action.op in STARTS:
            first, begun = started.pop((STARTS[action.op], action.model))
            yield action_span(row, first, begun, end)


def measured_costs(timeline: Timeline, stage_of: Mapping[int, int], tied: Collection[str] = ()) -> CostTable:
    """Costs from the spans of all ranks, where row r plays stage `stage_of[r]`; the rows of a stage pair
    up in order with those of its neighbours. Passes, steps and starts cost their mean, transfers and
    collectives the least seen, because what hides behind compute looks longer than it is. `tied`: models
    whose reductions join the first and last stage.
    """
    rows = _Rows(timeline, stage_of)
    table: defaultdict[str, dict[str, Seconds]] = defaultdict(dict)
    for model, kind in rows.kinds:
        if kind in COMPUTE or kind in map(starts, COLLECTIVES):
            samples = [rows.lengths(model, kind, stage) for stage in rows.stages]
            table[model][kind] = tuple(sum(x) / len(x) if x else None for x in samples)
        elif kind in COLLECTIVES:
            samples = [rows.meetings(model, kind, stage, model in tied) for stage in rows.stages]
            table[model][kind] = tuple(min(x, default=None) for x in samples)
    for model in list(table):
        for payload, after, hop in ((Payload.ACTIVATION, {Op.FORWARD}, 1), (Payload.GRADIENT, GRADIENTS, -1)):
            samples = [rows.journeys(model, payload, after, stage, stage + hop) for stage in rows.stages]
            if any(samples):
                table[model][payload] = tuple(min(x, default=None) for x in samples)
    return CostTable(dict(table))


class _Rows:
    """The spans of a timeline by model, category and row; within a row by micro-batch and how often it
    came before."""

    def __init__(self, timeline: Timeline, stage_of: Mapping[int, int]) -> None:
        self.stages = range(max(stage_of.values()) + 1)
        self._ranks = [sorted(r for r, s in stage_of.items() if s == stage) for stage in self.stages]
        self._spans: defaultdict[tuple[str, str, int], dict[tuple[int, int], Span]] = defaultdict(dict)
        before: Counter[tuple[str, str, int, int]] = Counter()
        for span in sorted((s for s in timeline.spans if s.row in stage_of), key=lambda s: s.start):
            place = span.model, span.category, span.row
            self._spans[place][span.microbatch, before[*place, span.microbatch]] = span
            before[*place, span.microbatch] += 1
        self.kinds = sorted({(model, category) for model, category, _ in self._spans})

    def lengths(self, model: str, kind: str, stage: int) -> list[float]:
        """Seconds of every span of a stage."""
        return [s.seconds for rank in self._ranks[stage] for s in self._spans[model, kind, rank].values()]

    def meetings(self, model: str, kind: str, stage: int, tied: bool) -> list[float]:
        """Seconds from when the last member of a collective came until a rank of the stage went on; none
        where it went on before, as clocks differ."""
        members, ends = [stage], (0, self.stages[-1])
        if kind == Op.NORM:
            members = list(self.stages)
        elif kind == Op.REDUCE and tied and stage in ends:
            members = list(ends)
        others = [self._spans[model, kind, rank] for member in members for rank in self._ranks[member]]
        mine = [self._spans[model, kind, rank] for rank in self._ranks[stage]]
        came = {key: max(o[key].start for o in others) for spans in mine for key in spans}
        return [max(0.0, s.end - came[key]) for spans in mine for key, s in spans.items()]

    def journeys(
        self, model: str, payload: Payload, after: Collection[Op], src: int, dst: int
    ) -> list[float]:
        """Seconds from the end of a pass, by its ops, until the next stage has waited for what it yields."""
        if dst not in self.stages:
            return []
        seconds = []
        for sender, receiver in zip(self._ranks[src], self._ranks[dst], strict=True):
            passes = {key: s for op in after for key, s in self._spans[model, op, sender].items()}
            waits = self._spans[model, f"{Op.WAIT_RECV} {payload}", receiver]
            seconds += [max(0.0, wait.end - passes[key].end) for key, wait in waits.items()]
        return seconds
