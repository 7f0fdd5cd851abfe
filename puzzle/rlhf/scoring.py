"""What responses score: the sum of a reward model's scores and of weighted functions, on every rank."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzle.config.reward import MODEL_PART, RewardConfig
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.identity import launched
from puzzle.engine.runtime.mailbox import Mailbox
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.scores import LARGEST
from puzzle.rlhf.rewards.weighted import Opened, Scored, WeightedRewards


@dataclass(frozen=True)
class Scores:
    """`total_B` float32 (B,) is what is learnt from. `parts` are the scores of each reward before its weight,
    by name, where there are several: float64 (B,) on the CPU."""

    total_B: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Mean, least and largest score of each part."""
        found: dict[str, float] = {}
        for name, scores in self.parts.items():
            found[f"reward.{name}"] = float(scores.mean())
            found[f"reward_min.{name}"], found[f"reward_max.{name}"] = (
                float(scores.min()),
                float(scores.max()),
            )
        return found


Heard = Callable[[int, Sequence[int]], None]
"""Hears of a response that has ended: its row and its tokens."""


class _Early:
    """On rank 0: has responses scored as they end. Their texts are made by a thread, another one takes what
    other replicas post."""

    def __init__(
        self,
        opened: Opened,
        one: Callable[[int, Sequence[int]], RewardBatch],
        box: Mailbox | None,
        others: int,
    ) -> None:
        self._opened, self._one = opened, one
        self._ended: queue.SimpleQueue[tuple[int, Sequence[int]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._feed, name="rewards begin", daemon=True)]
        if box is not None and others:
            take = threading.Thread(target=self._take, args=(box, others), name="responses", daemon=True)
            self._threads.insert(0, take)
        for thread in self._threads:
            thread.start()

    def _take(self, box: Mailbox, others: int) -> None:
        for _ in range(others):
            self.hear(*json.loads(box.take()))

    def _feed(self) -> None:
        # What goes wrong with a text goes wrong again, and is told, when the batch is whole.
        with contextlib.suppress(Exception):
            while (ended := self._ended.get()) is not None:
                self._opened.add(ended[0], self._one(*ended))

    def hear(self, row: int, tokens: Sequence[int]) -> None:
        """A response has ended."""
        self._ended.put((row, tokens))

    def complete(self, batch: RewardBatch) -> Callable[[], Scored]:
        """All have ended, which other replicas have posted before this rank can know it."""
        for thread in self._threads[:-1]:
            thread.join()
        self._ended.put(None)
        self._threads[-1].join()
        return self._opened.complete(batch)


class Scorer:
    """Has functions score on rank 0 while the models of inference run; with `early`, those that are called
    for each response while others are still decoded."""

    def __init__(
        self, world: World, config: RewardConfig, rewards: WeightedRewards | None, early: bool = False
    ) -> None:
        self.world, self.config, self.rewards = world, config, rewards
        launched_alike = world.size == 1 or launched() is not None  # else nobody knows the store's place
        self.listens = early and rewards is not None and rewards.any_each and launched_alike
        self._early: _Early | None = None
        self._box: Mailbox | None = None
        self._spent = {"computed": 0.0, "waited": 0.0}

    def spent(self) -> dict[str, float] | None:
        """Seconds that functions `computed` and for which the trainer `waited` since the last call; None
        without functions."""
        found, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return None if self.rewards is None else found

    def listen(
        self, actor: ModelRuntime, count: int, one: Callable[[int, Sequence[int]], RewardBatch]
    ) -> Heard | None:
        """What hears of the responses that this rank speaks for, of `count` that `actor` will generate; `one`
        is the batch of one. All ranks call; the next batch that they `begin` is these."""
        if not self.listens:
            return None
        place, first = actor.coord, actor.placement.coord_of(0).d
        if actor.placement.layout.dp > 1 and self._box is None:
            self._box = Mailbox("responses")
        if self.world.rank == 0:
            assert self.rewards is not None
            others = count - len(actor.rows(count))
            self._early = _Early(self.rewards.open(count), one, self._box, others)
            return self._early.hear
        box = self._box
        if box is None or place.d == first or (place.p, place.t) != (0, 0):
            return None
        return lambda row, tokens: box.post(json.dumps([row, list(tokens)]))

    def begin(self, batch: Callable[[], RewardBatch]) -> Callable[[], Scored] | None:
        """Functions begin to score the batch, or go on with it; None on other ranks, and where there are
        none."""
        if self.rewards is None or self.world.rank:
            return None
        early, self._early = self._early, None
        return self.rewards.begin(batch()) if early is None else early.complete(batch())

    def finish(self, pending: Callable[[], Scored] | None, model_B: Tensor | None) -> Scores:
        """Wait for the functions, tell all ranks, and add the model's scores. The UserError of a function is
        raised on all ranks."""
        if self.rewards is None:
            assert model_B is not None, "validated by TrainConfig"
            return Scores(model_B if self.config.weight == 1 else model_B * self.config.weight)
        found: Scored | UserError | None = None
        if pending is not None:
            with self.world.progress.busy("the reward function", self.rewards.longest):
                try:
                    found = pending()
                except UserError as error:
                    found = error
        found = self.world.share(found)
        if isinstance(found, UserError):
            raise found
        assert found is not None, "rank 0 has waited"
        self._trace(found)
        self._spent["computed"] += found.computed
        self._spent["waited"] += found.waited
        parts = dict(found.scores)
        weights = {part.name: part.weight for part in self.rewards.parts}
        if model_B is not None:
            parts[MODEL_PART], weights[MODEL_PART] = model_B.tolist(), self.config.weight
        total_B = torch.tensor(_sum(parts, weights), dtype=torch.float32, device=self.world.device)
        several = parts if len(parts) > 1 else {}
        return Scores(total_B, {name: torch.tensor(x, dtype=torch.float64) for name, x in several.items()})

    def _trace(self, found: Scored) -> None:
        clock = self.world.clock
        if clock is None or self.world.rank:
            return
        for name, (began, ended) in found.spans.items():
            clock.host_span(f"reward {name}", name, began, ended)
        clock.host_span("reward wait", "wait", found.asked, found.asked + found.waited)


def _sum(parts: Mapping[str, list[float]], weights: Mapping[str, float]) -> list[float]:
    """The weighted sums, row by row, NaN where a model gave that; UserError for one that float32 does not
    hold."""
    totals = [
        sum(weights[name] * score for name, score in zip(parts, row, strict=True))
        for row in zip(*parts.values(), strict=True)
    ]
    for row, total in enumerate(totals):
        if abs(total) > LARGEST:
            raise UserError(
                f"reward: the weighted sum of response {row + 1} of {len(totals)} is {total:g}; float32 ends"
                f" at {LARGEST:.2g}, lower the weights"
            )
    return totals
