"""Puts transfers around the passes of a stage: builders order passes, this adds sends, receives, waits."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from puzzle.plan.schedule import PASSES, Action, Channel, Message, Op, Payload, transfer

Flow = Callable[[int, Action], tuple[list[Message], list[Message]]]
"""The messages that a pass of a stage needs before it, and those that it yields."""


def pipeline_flow(num_stages: int) -> Flow:
    """A plain pipeline: hidden states go to the next stage, their gradients to the stage before."""

    def flow(stage: int, action: Action) -> tuple[list[Message], list[Message]]:
        forward = action.op is Op.FORWARD
        hop, payload = (1, Payload.ACTIVATION) if forward else (-1, Payload.GRADIENT)

        def leaving(src: int) -> list[Message]:
            if not (0 <= src < num_stages and 0 <= src + hop < num_stages):
                return []
            return [Message(Channel(src, src + hop, payload), action.model, action.microbatch, action.step)]

        return leaving(stage - hop), leaving(stage)

    return flow


def wire(
    stage: int,
    passes: Sequence[Action],
    flow: Flow,
    prefetch: int = 1,
    send_buffers: Mapping[Payload, int] | None = None,
    tail: Sequence[Message] = (),
) -> tuple[Action, ...]:
    """The full action list of a stage from its passes in order (optimizer actions may stand among them).

    A receive is started `prefetch` passes before the pass that needs it, and before that earlier pass's
    own waits, so that the transfer runs beside compute. At most `send_buffers[payload]` (default 1) sends of
    a channel are under way: a further one first waits for the oldest. `tail` is received at the end, without
    a pass that needs it. The list ends with no transfer under way.
    """
    limits = send_buffers or {}
    needed = [flow(stage, a)[0] for a in passes if a.op in PASSES]
    under_way: defaultdict[Channel, deque[Message]] = defaultdict(deque)
    out: list[Action] = []
    posted = reached = 0
    for action in passes:
        if action.op not in PASSES:
            out.append(action)
            continue
        while posted < len(needed) and posted <= reached + prefetch:
            out.extend(transfer(Op.RECV, m, stage) for m in needed[posted])
            posted += 1
        out.extend(transfer(Op.WAIT_RECV, m, stage) for m in needed[reached])
        out.append(action)
        reached += 1
        for message in flow(stage, action)[1]:
            queue = under_way[message.channel]
            while len(queue) >= limits.get(message.channel.payload, 1):
                out.append(transfer(Op.WAIT_SEND, queue.popleft(), stage))
            out.append(transfer(Op.SEND, message, stage))
            queue.append(message)
    out.extend(transfer(Op.RECV, m, stage) for m in tail)
    out.extend(transfer(Op.WAIT_RECV, m, stage) for m in tail)
    out.extend(transfer(Op.WAIT_SEND, m, stage) for queue in under_way.values() for m in queue)
    return tuple(out)
