"""Which messages passes need and yield, and where transfers start and end; builders only order passes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from puzzle.plan.pipeline.actions import (
    GRADIENTS,
    PASSES,
    Action,
    Channel,
    Message,
    Op,
    Payload,
    RingSpec,
    Schedule,
    transfer,
)

Flow = Callable[[int, Action], tuple[list[Message], list[Message]]]
"""The messages that a pass of a stage needs before it, and those that it yields."""


def flow_of(schedule: Schedule) -> Flow:
    """What the passes of a schedule need and yield, by the specs of a schedule."""
    named = [spec.model for spec in schedule.specs if isinstance(spec, RingSpec)]
    rings = {model: ring_flow(schedule.num_stages, model) for model in named}
    pipeline = pipeline_flow(schedule.num_stages)
    return lambda stage, action: rings.get(action.model, pipeline)(stage, action)


def pipeline_flow(num_stages: int) -> Flow:
    """A plain pipeline: hidden states go to the next stage, their gradients to the stage before; those of
    weights go nowhere."""

    def flow(stage: int, action: Action) -> tuple[list[Message], list[Message]]:
        back = action.op in GRADIENTS
        hop, payload = (-1, Payload.GRADIENT) if back else (1, Payload.ACTIVATION)

        def leaving(src: int) -> list[Message]:
            stays = action.op is Op.BACKWARD_WEIGHT
            if stays or not (0 <= src < num_stages and 0 <= src + hop < num_stages):
                return []
            return [Message(Channel(src, src + hop, payload), action.model, action.microbatch, action.step)]

        return leaving(stage - hop), leaving(stage)

    return flow


def ring_flow(num_stages: int, model: str) -> Flow:
    """A decode ring: hidden states go down the pipeline; the token ids that step n sampled for a decode
    micro-batch go from the last stage straight to the first, whose step n + 1 needs them. The first step
    reads what was asked, which all stages know, so a prefill yields no tokens. With one stage nothing is
    sent."""
    pipeline = pipeline_flow(num_stages)
    last = num_stages - 1

    def tokens(microbatch: int, step: int) -> list[Message]:
        return [Message(Channel(last, 0, Payload.TOKENS), model, microbatch, step)] if step else []

    def flow(stage: int, action: Action) -> tuple[list[Message], list[Message]]:
        needs, yields = pipeline(stage, action)
        if num_stages > 1 and action.op is Op.DECODE:
            needs = tokens(action.microbatch, action.step - 1) if stage == 0 else needs
            yields = tokens(action.microbatch, action.step) if stage == last else yields
        return needs, yields

    return flow


class TransferBuilder:
    """Adds the transfers of one stage, part after part. The last of two stages in 1F1B:

        from 0    recv 0 wait       recv 1 ~~~~~~~~~ wait       recv 2 ~~~~~~~~~~~~~~~~~~~~~~~ wait
        stage 1               F0 |           B0           F1 |           B1                         F2
        to 0                                   send 0 ~~~~~~~~~~~~~~~~~~~~~ wait  send 1 ~~~~~~~~~~~~~~

    A receive is started a pass before the one that needs it, and before that earlier pass's own waits, so
    that the transfer runs beside compute; never before its part. At most one send of a channel is
    under way: a further one first waits for the oldest. Of token ids (small, and needed late) there may be
    `token_sends`, and they alone may still be under way at the end of a part.
    """

    def __init__(self, stage: int, flow: Flow, token_sends: int = 1) -> None:
        self._stage = stage
        self._flow = flow
        self._token_sends = token_sends
        self._under_way: defaultdict[Channel, deque[Message]] = defaultdict(deque)

    def resume(self, under_way: Iterable[Message]) -> None:
        """Takes over sends that an earlier part left under way."""
        for message in under_way:
            self._under_way[message.channel].append(message)

    def part(self, passes: Sequence[Action]) -> list[Action]:
        """The action list of a part from its passes in order; optimizer actions may stand among them."""
        needed = [self._flow(self._stage, a)[0] for a in passes if a.op in PASSES]
        out: list[Action] = []
        posted = reached = 0
        for action in passes:
            if action.op in PASSES:
                while posted < len(needed) and posted <= reached + 1:
                    out += self._all(Op.RECV, needed[posted])
                    posted += 1
                out += self._all(Op.WAIT_RECV, needed[reached])
                reached += 1
            out.append(action)
            if action.op in PASSES:
                for message in self._flow(self._stage, action)[1]:
                    out += self._send(message)
        for channel in [c for c in self._under_way if c.payload is not Payload.TOKENS]:
            out += self._all(Op.WAIT_SEND, self._under_way.pop(channel))
        return out

    def drain(self, tail: Sequence[Message] = ()) -> list[Action]:
        """The end: receives `tail`, which no pass needs, and waits for every send."""
        out = self._all(Op.RECV, tail) + self._all(Op.WAIT_RECV, tail)
        while self._under_way:
            out += self._all(Op.WAIT_SEND, self._under_way.popitem()[1])
        return out

    def _all(self, op: Op, messages: Iterable[Message]) -> list[Action]:
        return [transfer(op, message, self._stage) for message in messages]

    def _send(self, message: Message) -> list[Action]:
        queue = self._under_way[message.channel]
        limit = self._token_sends if message.channel.payload is Payload.TOKENS else 1
        waits = [queue.popleft()] if len(queue) >= limit else []
        queue.append(message)
        return [*self._all(Op.WAIT_SEND, waits), transfer(Op.SEND, message, self._stage)]
