"""Runs a schedule on this rank's stage: passes on the device, transfers on channels of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from puzzle.engine.runtime.world import World
from puzzle.plan.pipeline.actions import COLLECTIVES, TRANSFERS, Action, Channel, Message, Op, Schedule

WAITS = frozenset({Op.WAIT_SEND, Op.WAIT_RECV, *COLLECTIVES.values()})
"""Actions in which a rank may have to wait for others."""


class StageProgram(Protocol):
    """One model's share of a schedule on this rank."""

    def buffer(self, action: Action) -> Tensor:
        """An empty tensor of the shape and dtype of the message that `action` receives."""
        ...

    def compute(self, action: Action, received: Tensor | None) -> Sequence[Tensor]:
        """Do a pass with what it needs; the tensors of the sends that follow it, in their order."""
        ...

    def optimize(self, op: Op) -> None:
        """Start, or wait for, a part of the optimizer step."""
        ...


class Executor:
    """Executes schedules for one pipeline: `ranks[s]` is the global rank of its stage s."""

    def __init__(self, world: World, ranks: tuple[int, ...], pipelines: tuple[tuple[int, ...], ...]) -> None:
        """`pipelines` are the rank lists of all pipelines of the placement, alike on every rank."""
        self.world = world
        self.ranks = ranks
        self.stage = ranks.index(world.rank)
        self.pipelines = pipelines

    def begin(self, stage: str, channels: Iterable[Channel]) -> Execution:
        """A stage of the log whose schedule comes in parts; all ranks of the run name the same channels."""
        ends = [(p[c.src], p[c.dst], c) for c in channels for p in self.pipelines]
        groups = self.world.connect(ends)
        if self.world.clock is not None:
            self.world.clock.begin(stage)
        return Execution(self, groups)


class Execution:
    """Tensors and transfers under way; they may stay so between the parts of a schedule."""

    def __init__(self, executor: Executor, groups: Mapping[Channel, dist.ProcessGroup]) -> None:
        self.executor, self.groups = executor, groups
        self.models: Mapping[str, StageProgram] = {}
        self.world, self.stage = executor.world, executor.stage
        self.under_way: dict[Message, tuple[Tensor, dist.Work]] = {}
        self.arrived: list[Tensor] = []
        self.leaving: deque[Tensor] = deque()

    def run(self, part: Schedule, models: Mapping[str, StageProgram]) -> None:
        """This stage's actions of the part, in order."""
        clock, progress = self.world.clock, self.world.progress
        self.models = models
        before = progress.doing
        for action in part.actions[self.stage]:
            progress.mark(f"{before}: {self._name(action)}", action.op in WAITS)
            if clock is None or action.op in (Op.SEND, Op.RECV):
                self._do(action)
                continue
            start = clock.now()
            self._do(action)
            clock.mark(action, start)
        progress.mark(before)

    def finish(self, schedule: Schedule | None = None) -> None:
        """All parts together were `schedule`, for the log; None if nothing ran."""
        if self.world.clock is not None and schedule is not None:
            self.world.clock.end(schedule)
        assert not self.under_way, "the schedule ended with transfers under way"

    def _do(self, action: Action) -> None:
        if action.op in TRANSFERS:
            try:
                self._transfer(action)
            except RuntimeError as error:
                raise RuntimeError(f"{self._name(action)} failed: {error}") from error
        elif action.op in COLLECTIVES or action.op in COLLECTIVES.values() or action.op is Op.STEP:
            self.models[action.model].optimize(action.op)
        else:
            received = self.arrived.pop() if self.arrived else None
            self.leaving.extend(self.models[action.model].compute(action, received))

    def _name(self, action: Action) -> str:
        """The action's label, with the peer's rank."""
        peer = action.peer
        return action.label if peer is None else f"{action.label} (rank {self.executor.ranks[peer]})"

    def _transfer(self, action: Action) -> None:
        message = action.message(self.stage)
        group, peer = self.groups[message.channel], self.executor.ranks[action.peer or 0]
        if action.op is Op.SEND:
            assert self.leaving, f"{action.label}: nothing to send"
            tensor = self.leaving.popleft().contiguous()
            work = dist.isend(tensor, peer, group=group)
            assert work is not None
            self.under_way[message] = (tensor, work)
            self.world.moved[str(message.channel.payload)] += tensor.nbytes
        elif action.op is Op.RECV:
            tensor = self.models[action.model].buffer(action)
            work = dist.irecv(tensor, peer, group=group)
            assert work is not None
            self.under_way[message] = (tensor, work)
        else:
            tensor, work = self.under_way.pop(message)
            work.wait()
            if action.op is Op.WAIT_RECV:
                self.arrived.append(tensor)
