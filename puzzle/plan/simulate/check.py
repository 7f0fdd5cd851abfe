"""What makes a schedule right. Independent of how it was built; it reads only the specs and the action
lists."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from itertools import accumulate, zip_longest

from puzzle.plan.pipeline.actions import (
    GRADIENTS,
    PASSES,
    TRANSFERS,
    Action,
    Channel,
    Message,
    Op,
    PipelineSpec,
    RingSpec,
    Schedule,
    transfer,
)
from puzzle.plan.pipeline.transfers import flow_of
from puzzle.plan.simulate.simulate import VirtualExecution

_BACKWARDS = GRADIENTS | {Op.BACKWARD_WEIGHT}
_OPTIMIZER = (Op.REDUCE, Op.WAIT_REDUCE, Op.NORM, Op.WAIT_NORM, Op.STEP, Op.GATHER, Op.WAIT_GATHER)


@lru_cache(maxsize=256)
def checked(build: Callable[..., Schedule], *arguments: Hashable, **options: Hashable) -> Schedule:
    """`build(*arguments, **options)`, made and checked once, then kept: all schedules that run are.

    RuntimeError with all violations.
    """
    schedule = build(*arguments, **options)
    if broken := check(schedule):
        names = ", ".join(spec.model for spec in schedule.specs)
        raise RuntimeError(f"{schedule.name} of {names}: {'; '.join(broken)}")
    return schedule


def check(schedule: Schedule) -> list[str]:
    """Every violation, one line each; an empty list for a right schedule.

    Complete: each stage runs each pass and optimizer action of its specs once, after what it depends on.
    Messages are sent after the pass that yields them, received before the pass that needs them, once, and
    waited for. Both ends of a channel issue its messages in one order, all stages issue the sums of norms
    in one order, and an execution in which a transfer ends only when both sides have started it reaches
    the end.
    """
    broken = [*_spec_faults(schedule), *_well_formed(schedule)]
    if broken:
        return broken
    for stage in range(schedule.num_stages):
        broken += _Stage(schedule, stage).violations()
    broken += _orders(schedule)
    broken += [f"deadlock: {line}" for line in VirtualExecution(schedule, lambda stage, action: 0.0).run()]
    return broken


def _spec_faults(schedule: Schedule) -> Iterator[str]:
    names = [w.model for w in schedule.specs]
    if len(set(names)) < len(names):
        yield f"a model has two specs among {names}"
    for spec in schedule.specs:
        if not isinstance(spec, RingSpec):
            continue
        if not spec.decode:
            yield "a ring without decode micro-batches"
        for kind, sizes in (("prefill", spec.passes), ("decode", spec.decode)):
            if any(size < 1 for size in sizes):
                yield f"{kind} micro-batches of {sizes} sequences"


def _well_formed(schedule: Schedule) -> Iterator[str]:
    stages = range(schedule.num_stages)
    for stage, action in schedule.walk():
        is_transfer = action.op in TRANSFERS
        if is_transfer != (action.peer is not None) or is_transfer != (action.payload is not None):
            yield f"stage {stage}: {action.label} and its peer and payload do not fit"
        elif action.peer is not None and (action.peer not in stages or action.peer == stage):
            yield f"stage {stage}: {action.label} has no such peer"


def _passes(spec: PipelineSpec | RingSpec) -> list[Action]:
    """The passes that every stage owes to a spec."""
    if isinstance(spec, PipelineSpec):
        backward = [Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT] if spec.split else [Op.BACKWARD]
        ops = [Op.FORWARD, *backward] if spec.backward else [Op.FORWARD]
        return [Action(op, spec.model, m) for op in ops for m in range(spec.microbatches)]
    prefills = [Action(Op.PREFILL, spec.model, i) for i in range(len(spec.passes))]
    steps, microbatches = range(1, spec.rounds + 1), range(len(spec.decode))
    return prefills + [Action(Op.DECODE, spec.model, j, step=t) for t in steps for j in microbatches]


def _before(spec: PipelineSpec | RingSpec, action: Action) -> list[Action]:
    """The passes of the same stage that a pass depends on: a backward on its forward and, so that sums of
    gradients are bitwise the same in every order of models, on the backward before, and so its second part
    on the first; a decode step on its keys and values, from the step before and from the prefill passes of
    its round; such a pass on the round before, which says whose rows have come free."""
    model, m = spec.model, action.microbatch
    if isinstance(spec, PipelineSpec):
        if action.op is Op.FORWARD:
            return []
        first = Op.BACKWARD_INPUT if action.op is Op.BACKWARD_WEIGHT else Op.FORWARD
        return [Action(first, model, m), *([Action(action.op, model, m - 1)] if m else [])]
    if action.op is Op.PREFILL:
        before = _round_of(spec, m) - 1
        return [Action(Op.DECODE, model, j, step=before) for j in range(len(spec.decode)) if before]
    joined = [i for i in range(len(spec.passes)) if _round_of(spec, i) == action.step]
    step = [Action(Op.DECODE, model, m, step=action.step - 1)] if action.step > 1 else []
    return [*step, *(Action(Op.PREFILL, model, i) for i in joined)]


def _round_of(spec: RingSpec, number: int) -> int:
    """The round (from 1) before which a prefill pass stands."""
    ends = accumulate(map(len, spec.prefills))
    return next(step for step, end in enumerate(ends, 1) if number < end)


class _Stage:
    """The rules that one stage's list can break by itself."""

    def __init__(self, schedule: Schedule, stage: int) -> None:
        self._actions = schedule.actions[stage]
        self._stage = stage
        self._flow = flow_of(schedule)
        self._specs = {w.model: w for w in schedule.specs}
        self._owed = Counter(a for w in schedule.specs for a in _passes(w))
        for spec in schedule.specs:
            if isinstance(spec, PipelineSpec) and spec.optimizer:
                self._owed.update(Action(op, spec.model) for op in _OPTIMIZER)
        self._done: Counter[Action] = Counter()
        self._yielded: set[Message] = set()

    def violations(self) -> list[str]:
        """All of them, each with the stage and the action."""
        broken = []
        for action in self._actions:
            broken += [f"stage {self._stage}: {action.label} {why}" for why in self._faults(action)]
            self._done[action] += 1
            if action.op in PASSES:
                self._yielded.update(self._flow(self._stage, action)[1])
        return broken + list(self._missing())

    def _faults(self, action: Action) -> Iterator[str]:
        if self._done[action]:
            yield "comes twice"
        if action.op in TRANSFERS:
            yield from self._transfer_faults(action)
            return
        if not self._owed[action]:
            yield "is in no spec"
            return
        if action.op in PASSES:
            needs = [transfer(Op.WAIT_RECV, m, self._stage) for m in self._flow(self._stage, action)[0]]
            missing = [a for a in [*_before(self._specs[action.model], action), *needs] if not self._done[a]]
            if self._done[Action(Op.STEP, action.model)]:
                yield "comes after the optimizer step"
        else:
            previous = _OPTIMIZER[: _OPTIMIZER.index(action.op)]
            missing = [Action(op, action.model) for op in previous]
            missing += [a for a in self._owed if a.model == action.model and a.op in _BACKWARDS]
            missing = [a for a in missing if not self._done[a]]
        yield from (f"comes before {a.label}" for a in missing)

    def _transfer_faults(self, action: Action) -> Iterator[str]:
        message = action.message(self._stage)
        if action.op is Op.WAIT_SEND and not self._done[transfer(Op.SEND, message, self._stage)]:
            yield "comes before the send"
        if action.op is Op.WAIT_RECV and not self._done[transfer(Op.RECV, message, self._stage)]:
            yield "comes before the receive"
        if action.op is Op.SEND and message not in self._yielded:
            yield "comes before the pass that yields it"

    def _missing(self) -> Iterator[str]:
        for action in self._owed - self._done:
            yield f"stage {self._stage}: {action.label} is missing"
        for message in self._yielded:
            if not self._done[transfer(Op.SEND, message, self._stage)]:
                yield f"stage {self._stage}: nobody sends {message}"
        for action in self._actions:
            if action.op in (Op.SEND, Op.RECV):
                wait = Op.WAIT_SEND if action.op is Op.SEND else Op.WAIT_RECV
                if not self._done[transfer(wait, action.message(self._stage), self._stage)]:
                    yield f"stage {self._stage}: nobody waits for {action.label}"


def _orders(schedule: Schedule) -> Iterator[str]:
    """Both ends of a communicator must issue the same operations in the same order."""
    sent: defaultdict[Channel, list[Message]] = defaultdict(list)
    received: defaultdict[Channel, list[Message]] = defaultdict(list)
    for stage, action in schedule.walk():
        if action.op in (Op.SEND, Op.RECV):
            message = action.message(stage)
            (sent if action.op is Op.SEND else received)[message.channel].append(message)
    for channel in sorted(sent.keys() | received.keys()):
        for k, (a, b) in enumerate(zip_longest(sent[channel], received[channel])):
            if a != b:
                yield f"{channel}: transfer {k} is sent as {a} and received as {b}"
                break
    norms = [[a.model for a in stage if a.op is Op.NORM] for stage in schedule.actions]
    if any(order != norms[0] for order in norms):
        yield f"the stages sum norms in different orders: {norms}"
