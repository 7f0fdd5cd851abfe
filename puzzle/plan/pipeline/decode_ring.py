"""The decode ring: rounds of decode micro-batches that chase one another through the stages, and prefills
between them.

Stages hand hidden states down the pipeline; the last one sends the sampled token ids straight to the
first, which starts the next step of that micro-batch. With at least as many decode micro-batches as stages
nobody waits. Three stages and micro-batches, three rounds; before the third, P3 caches what a row that has
come free reads next:

    stage 0   P0 P1 P2 D0 D1 D2 D0 D1 D2 P3 D0 D1 D2
    stage 1    . P0 P1 P2 D0 D1 D2 D0 D1 D2 P3 D0 D1 D2
    stage 2    .  . P0 P1 P2 D0 D1 D2 D0 D1 D2 P3 D0 D1 D2
              prefill |round 1 |round 2 |   |round 3 | drain

A prefill caches all tokens of a sequence but the last, and the decode step that reads that one draws the
next: so no tokens follow from a prefill, and sequences that share a prompt share what it cached.

How many rounds it takes, and who joins when, is known only when sequences stop, so the ring is made of parts
that repeat: a round of step n is the round of step 1 with its steps moved by n - 1, and only token ids are
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
    """Generation in `rows` rows on `num_stages` stages, decoded `decode_mb` at a time (the last micro-batch
    holds the remainder). Impossible numbers raise UserError."""

    num_stages: int
    rows: int
    decode_mb: int
    model: str = "actor"

    def __post_init__(self) -> None:
        for name in ("num_stages", "rows", "decode_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"a decode ring needs {name} of at least 1, not {getattr(self, name)}")

    def spec(self, prefills: tuple[tuple[int, ...], ...] = ()) -> RingSpec:
        """What the ring does with `prefills`: the sequences of each prefill pass before every round."""
        starts = range(0, self.rows, self.decode_mb)
        sizes = tuple(min(self.decode_mb, self.rows - start) for start in starts)
        return RingSpec(self.model, sizes, prefills)

    @property
    def decode_microbatches(self) -> int:
        """Decode micro-batches in a round."""
        return -(-self.rows // self.decode_mb)

    def prefill(self, first: int, count: int) -> Schedule:
        """Prefill passes `first` to `first + count - 1`, before a round."""
        passes = self._prefills(first, count)
        return self._schedule("ring prefill", lambda stage: self._transfers(stage).part(passes))

    def round(self, step: int) -> Schedule:
        """One decode step of every decode micro-batch; `step` counts from 1."""

        def actions(stage: int) -> list[Action]:
            transfers = self._transfers(stage)
            if stage == self.num_stages - 1:
                transfers.resume(self._tokens(step - 1))
            return transfers.part(self._decodes(step))

        return self._schedule("ring round", actions)

    def drain(self, step: int) -> Schedule:
        """The end after the round of `step`: the first stage receives the last token ids."""

        def actions(stage: int) -> list[Action]:
            transfers = self._transfers(stage)
            if stage == self.num_stages - 1:
                transfers.resume(self._tokens(step))
            return transfers.drain(self._tokens(step) if stage == 0 else ())

        return self._schedule("ring drain", actions)

    def unrolled(self, prefills: tuple[tuple[int, ...], ...]) -> Schedule:
        """All of it as one schedule, to check, simulate and draw: `prefills` as in `spec`."""

        def actions(stage: int) -> list[Action]:
            transfers, out, number = self._transfers(stage), [], 0
            for step, before in enumerate(prefills, 1):
                out += transfers.part(self._prefills(number, len(before)))
                out += transfers.part(self._decodes(step))
                number += len(before)
            return out + transfers.drain(self._tokens(len(prefills)) if stage == 0 else ())

        whole = self._schedule("ring", actions)
        return Schedule(whole.name, whole.num_stages, whole.actions, (self.spec(prefills),))

    def _transfers(self, stage: int) -> TransferBuilder:
        flow = ring_flow(self.num_stages, self.model)
        return TransferBuilder(stage, flow, token_sends=self.decode_microbatches)

    def _schedule(self, name: str, actions: Callable[[int], list[Action]]) -> Schedule:
        return Schedule(name, self.num_stages, tuple(tuple(actions(s)) for s in range(self.num_stages)))

    def _prefills(self, first: int, count: int) -> list[Action]:
        return [Action(Op.PREFILL, self.model, first + i) for i in range(count)]

    def _decodes(self, step: int) -> list[Action]:
        return [Action(Op.DECODE, self.model, j, step=step) for j in range(self.decode_microbatches)]

    def _tokens(self, step: int) -> list[Message]:
        if self.num_stages == 1 or not step:
            return []
        channel = Channel(self.num_stages - 1, 0, Payload.TOKENS)
        return [Message(channel, self.model, j, step) for j in range(self.decode_microbatches)]


def ring_channels(num_stages: int) -> tuple[Channel, ...]:
    """Every channel of a ring of so many stages."""
    if num_stages == 1:
        return ()
    hops = [Channel(stage, stage + 1, Payload.ACTIVATION) for stage in range(num_stages - 1)]
    return (*hops, Channel(num_stages - 1, 0, Payload.TOKENS))
