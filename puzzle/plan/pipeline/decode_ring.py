"""The decode ring: prefill, then rounds of decode micro-batches that chase one another through the stages.

Stages hand hidden states down the pipeline; the last one sends the sampled token ids straight to the
first, which starts the next step of that micro-batch. With at least as many decode micro-batches as stages
nobody waits. Three stages and micro-batches, three rounds (D0 needs the tokens of P0 or of the D0 before):

    stage 0   P0 P1 P2 D0 D1 D2 D0 D1 D2 D0 D1 D2
    stage 1    . P0 P1 P2 D0 D1 D2 D0 D1 D2 D0 D1 D2
    stage 2    .  . P0 P1 P2 D0 D1 D2 D0 D1 D2 D0 D1 D2
              prefill |round 1 |round 2 |round 3 | drain

How many rounds it takes is known only when sequences stop, so the ring is made of parts that
repeat: a round of step n is the round of step 1 with its steps moved by n - 1, and only token ids are
under way between two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import Action, Channel, Message, Op, Payload, RingSpec, Schedule
from puzzle.plan.pipeline.transfers import TransferBuilder, ring_flow


@dataclass(frozen=True)
class Ring:
    """Generation for `batch` sequences on `num_stages` stages, prefilled `prefill_mb` and decoded
    `decode_mb` at a time (the last micro-batch of each kind holds the remainder). Impossible numbers raise
    UserError."""

    num_stages: int
    batch: int
    prefill_mb: int
    decode_mb: int
    model: str = "actor"

    def __post_init__(self) -> None:
        for name in ("num_stages", "batch", "prefill_mb", "decode_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"a decode ring needs {name} of at least 1, not {getattr(self, name)}")

    def spec(self, rounds: int) -> RingSpec:
        """What the ring does in `rounds` decode rounds."""
        return RingSpec(
            self.model, _cut(self.batch, self.prefill_mb), _cut(self.batch, self.decode_mb), rounds
        )

    @property
    def decode_microbatches(self) -> int:
        """Decode micro-batches in a round."""
        return -(-self.batch // self.decode_mb)

    def prefill(self) -> Schedule:
        """All prompts, up to the sends of every decode micro-batch's first token ids."""
        return self._schedule("ring prefill", lambda stage: self._transfers(stage).part(self._prefills()))

    def round(self, step: int) -> Schedule:
        """One decode step of every decode micro-batch."""

        def actions(stage: int) -> list[Action]:
            transfers = self._transfers(stage)
            if stage == self.num_stages - 1:
                transfers.resume(self._tokens(step - 1))
            return transfers.part(self._decodes(step))

        return self._schedule("ring round", actions)

    def drain(self, step: int) -> Schedule:
        """The end after the round of `step` (0: after the prefill): the first stage receives the last
        token ids."""

        def actions(stage: int) -> list[Action]:
            transfers = self._transfers(stage)
            if stage == self.num_stages - 1:
                transfers.resume(self._tokens(step))
            return transfers.drain(self._tokens(step) if stage == 0 else ())

        return self._schedule("ring drain", actions)

    def unrolled(self, rounds: int) -> Schedule:
        """Prefill, `rounds` rounds and the end as one schedule, to check, simulate and draw."""

        def actions(stage: int) -> list[Action]:
            transfers = self._transfers(stage)
            out = transfers.part(self._prefills())
            for step in range(1, rounds + 1):
                out += transfers.part(self._decodes(step))
            return out + transfers.drain(self._tokens(rounds) if stage == 0 else ())

        whole = self._schedule("ring", actions)
        return Schedule(whole.name, whole.num_stages, whole.actions, (self.spec(rounds),))

    def _transfers(self, stage: int) -> TransferBuilder:
        flow = ring_flow(self.num_stages, self.spec(0))
        return TransferBuilder(stage, flow, token_sends=self.decode_microbatches)

    def _schedule(self, name: str, actions: Callable[[int], list[Action]]) -> Schedule:
        return Schedule(name, self.num_stages, tuple(tuple(actions(s)) for s in range(self.num_stages)))

    def _prefills(self) -> list[Action]:
        return [Action(Op.PREFILL, self.model, i) for i in range(-(-self.batch // self.prefill_mb))]

    def _decodes(self, step: int) -> list[Action]:
        return [Action(Op.DECODE, self.model, j, step=step) for j in range(self.decode_microbatches)]

    def _tokens(self, step: int) -> list[Message]:
        if self.num_stages == 1:
            return []
        channel = Channel(self.num_stages - 1, 0, Payload.TOKENS)
        return [Message(channel, self.model, j, step) for j in range(self.decode_microbatches)]


def ring_channels(num_stages: int) -> tuple[Channel, ...]:
    """Every channel of a ring of so many stages."""
    if num_stages == 1:
        return ()
    hops = [Channel(stage, stage + 1, Payload.ACTIVATION) for stage in range(num_stages - 1)]
    return (*hops, Channel(num_stages - 1, 0, Payload.TOKENS))


def _cut(batch: int, size: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + size, batch)) for start in range(0, batch, size))
