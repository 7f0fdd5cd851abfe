"""The executor on real ranks: messages in order; a deadlock ends within the time-out and names the action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from puzzle.engine.pipeline.executor import Executor
from puzzle.engine.runtime.world import World
from puzzle.plan.pipeline.actions import Action, Op, Schedule
from tests.helpers import run_ranks
from tests.plan.measures import channels
from tests.plan.single import one_f_one_b


class Numbers:
    """Passes hand on the number of their micro-batch."""

    def __init__(self, stages: int, stage: int) -> None:
        self.ends = (Op.FORWARD, stages - 1), (Op.BACKWARD, 0)
        self.stage = stage
        self.got: list[float] = []

    def buffer(self, action: Action) -> Tensor:
        return torch.empty(1)

    def compute(self, action: Action, received: Tensor | None) -> Sequence[Tensor]:
        if received is not None:
            self.got.append(float(received))
        if (action.op, self.stage) in self.ends:
            return ()
        return (torch.tensor([float(action.microbatch + (100 if action.op is Op.BACKWARD else 0))]),)

    def optimize(self, op: Op) -> None:
        raise AssertionError(op)


def run(rank: int, schedule: Schedule) -> list[float] | str:
    world = World(rank, 2, torch.device("cpu"), timeout=3.0)
    numbers = Numbers(2, rank)
    try:
        execution = Executor(world, (0, 1), ((0, 1),)).begin("training.actor", channels(schedule))
        execution.run(schedule, {"actor": numbers})
        execution.finish(schedule)
    except RuntimeError as error:
        return str(error)
    return numbers.got


def blocking(stage: tuple[Action, ...]) -> tuple[Action, ...]:
    """Every send waited for at once, every receive begun only when it is needed."""
    out: list[Action] = []
    for action in stage:
        if action.op is Op.SEND:
            out += [action, replace(action, op=Op.WAIT_SEND)]
        elif action.op is Op.WAIT_RECV:
            out += [replace(action, op=Op.RECV), action]
        elif action.op not in (Op.WAIT_SEND, Op.RECV):
            out.append(action)
    return tuple(out)


RIGHT = one_f_one_b(2, 4)
STUCK = replace(RIGHT, actions=tuple(blocking(stage) for stage in RIGHT.actions))


def test_messages_arrive_in_order() -> None:
    found = run_ranks(run, 2, RIGHT)
    assert found == [[100.0, 101.0, 102.0, 103.0], [0.0, 1.0, 2.0, 3.0]]


def test_a_deadlock_ends_and_is_named() -> None:
    """A send to another gloo process is over when its receive has begun."""
    first, second = run_ranks(run, 2, STUCK)
    assert "wait_send actor 1 activation to 1 (rank 1) failed: " in first
    assert "wait_send actor 0 gradient to 0 (rank 0) failed: " in second
