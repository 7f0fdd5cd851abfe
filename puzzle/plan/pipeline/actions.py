"""Schedules as values: for every pipeline stage, the ordered actions that its ranks run.

A schedule says nothing about tensor or data parallelism: all ranks of a stage run the same list. Transfers
are started (`SEND`, `RECV`) and waited for (`WAIT_SEND`, `WAIT_RECV`) apart from each other. A *channel*
is a directed pair of stages and a payload kind; it has a communicator of two ranks and a stream of its
own, and models share it. So there is one order of messages in a channel, directions never block each
other, and a stage has at most four channels in a pipeline: fewer than a GPU has hardware queues, so a
waiting receive holds up no other stream.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Op(StrEnum):
    """What an action does. Values are the names used in traces and cost tables."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"
    PREFILL = "prefill"
    DECODE = "decode"
    SEND = "send"
    RECV = "recv"
    WAIT_SEND = "wait_send"
    WAIT_RECV = "wait_recv"
    REDUCE = "reduce"
    WAIT_REDUCE = "wait_reduce"
    NORM = "norm"
    WAIT_NORM = "wait_norm"
    STEP = "step"
    GATHER = "gather"
    WAIT_GATHER = "wait_gather"


class Payload(StrEnum):
    """What a channel carries: hidden states, their gradients, or token ids from the last stage to the
    first."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    TOKENS = "tokens"


GRADIENTS = frozenset({Op.BACKWARD, Op.BACKWARD_INPUT})
"""Passes that yield the gradient of what a stage read. A split backward leaves the gradients of matrices to
`BACKWARD_WEIGHT`, for which nobody waits."""
PASSES = frozenset({Op.FORWARD, *GRADIENTS, Op.BACKWARD_WEIGHT, Op.PREFILL, Op.DECODE})
"""Passes of a micro-batch through the layers of a stage: the actions that need and yield messages."""
COMPUTE = PASSES | {Op.STEP}
"""Actions that occupy the compute lane of a stage."""
TRANSFERS = frozenset({Op.SEND, Op.RECV, Op.WAIT_SEND, Op.WAIT_RECV})
COLLECTIVES = {Op.REDUCE: Op.WAIT_REDUCE, Op.NORM: Op.WAIT_NORM, Op.GATHER: Op.WAIT_GATHER}
"""Collectives of the optimizer, start to wait. Gradients are reduce-scattered over dp, squared norms are
summed over all ranks of the model (every stage takes part), stepped parameters are gathered over dp."""
STARTS = {wait: start for start, wait in COLLECTIVES.items()}


class Channel(NamedTuple):
    """A directed pair of stages and what it carries: one communicator, one stream, one order of messages."""

    src: int
    dst: int
    payload: Payload


class Message(NamedTuple):
    """One transfer: a micro-batch's hidden states, their gradients, or the token ids that a step sampled."""

    channel: Channel
    model: str
    microbatch: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a stage. Transfers alone have `payload` and `peer` (a stage); the optimizer's actions
    have microbatch -1; `step` counts decode steps from 1 (it is 0 elsewhere; prefill passes are numbered)."""

    op: Op
    model: str
    microbatch: int = -1
    payload: Payload | None = None
    peer: int | None = None
    step: int = 0

    def message(self, stage: int) -> Message:
        """The transfer that this action of `stage` starts or waits for; ValueError for other actions."""
        if self.op not in TRANSFERS or self.payload is None or self.peer is None:
            raise ValueError(f"{self.label} is no transfer")
        sends = self.op in (Op.SEND, Op.WAIT_SEND)
        src, dst = (stage, self.peer) if sends else (self.peer, stage)
        return Message(Channel(src, dst, self.payload), self.model, self.microbatch, self.step)

    @property
    def label(self) -> str:
        """A short name for traces and error lines."""
        words = [str(self.op), self.model]
        if self.microbatch >= 0:
            words.append(str(self.microbatch))
        if self.step:
            words.append(f"step {self.step}")
        if self.payload is not None:
            words.append(f"{self.payload} {'to' if 'send' in self.op else 'from'} {self.peer}")
        return " ".join(words)


def transfer(op: Op, message: Message, stage: int) -> Action:
    """The action by which `stage` starts or waits for its end of `message`."""
    src, dst, payload = message.channel
    return Action(op, message.model, message.microbatch, payload, dst if src == stage else src, message.step)


@dataclass(frozen=True)
class PipelineSpec:
    """What a schedule does for one model: forwards of `microbatches`, their backwards (`split`: in two
    parts), an optimizer step. `tied`: its gradient reduction also joins the first and the last stage, for
    tied embeddings."""

    model: str
    microbatches: int
    backward: bool = False
    optimizer: bool = False
    tied: bool = False
    split: bool = False


@dataclass(frozen=True)
class RingSpec:
    """What a decode ring does. `decode`: the rows of every decode micro-batch; a round draws one token for
    each row in use. `prefills`: for every round, the sequences of each prefill pass right before it: what
    they read joins the rows in use with that round."""

    model: str
    decode: tuple[int, ...]
    prefills: tuple[tuple[int, ...], ...]

    @property
    def rounds(self) -> int:
        """How often every decode micro-batch goes round."""
        return len(self.prefills)

    @property
    def passes(self) -> tuple[int, ...]:
        """Sequences of every prefill pass, by the number of its action."""
        return tuple(size for before in self.prefills for size in before)


@dataclass(frozen=True, repr=False)
class Schedule:
    """What every stage does, in order. `specs` is what `check` holds the actions to."""

    name: str
    num_stages: int
    actions: tuple[tuple[Action, ...], ...]
    specs: tuple[PipelineSpec | RingSpec, ...] = ()

    def __post_init__(self) -> None:
        if len(self.actions) != self.num_stages:
            raise ValueError(f"{self.name}: {len(self.actions)} action lists for {self.num_stages} stages")

    def __repr__(self) -> str:
        total = sum(map(len, self.actions))
        return f"Schedule({self.name!r}, {self.num_stages} stages, {total} actions, {self.hash[:12]})"

    @cached_property
    def hash(self) -> str:
        """sha256 of the action lists: equal for equal behaviour, whatever the name; the same everywhere."""
        rows = [
            [(a.op, a.model, a.microbatch, a.payload, a.peer, a.step) for a in stage]
            for stage in self.actions
        ]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def walk(self) -> Iterator[tuple[int, Action]]:
        """Every (stage, action), stage by stage."""
        return ((s, a) for s, stage in enumerate(self.actions) for a in stage)

    def counts(self) -> dict[str, int]:
        """How often every op occurs over all stages."""
        return dict(sorted(Counter(str(a.op) for _, a in self.walk()).items()))

    @property
    def flushes(self) -> int:
        """How often the pipeline runs empty: the first stage has no micro-batch between forward and backward.
        One stage, or forwards alone, run empty at the end only."""
        if self.num_stages == 1 or all(a.op not in GRADIENTS for a in self.actions[0]):
            return 1
        flushes = in_flight = 0
        for action in self.actions[0]:
            in_flight += (action.op is Op.FORWARD) - (action.op in GRADIENTS)
            flushes += action.op in GRADIENTS and in_flight == 0
        return flushes
