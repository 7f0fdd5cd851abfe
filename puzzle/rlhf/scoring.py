"""What responses score: the sum of a reward model's scores and of weighted functions, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzle.config.reward import MODEL_PART, RewardConfig
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.scores import LARGEST
from puzzle.rlhf.rewards.weighted import Scored, WeightedRewards


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


class Scorer:
    """Has functions score on rank 0 while the models of inference run."""

    def __init__(self, world: World, config: RewardConfig, rewards: WeightedRewards | None) -> None:
        self.world, self.config, self.rewards = world, config, rewards
        self._spent = {"computed": 0.0, "waited": 0.0}

    def spent(self) -> dict[str, float] | None:
        """Seconds that functions `computed` and for which the trainer `waited` since the last call; None
        without functions."""
        found, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return None if self.rewards is None else found

    def begin(self, batch: Callable[[], RewardBatch]) -> Callable[[], Scored] | None:
        """Functions begin to score the batch; None on other ranks, and where there are none."""
        if self.rewards is None or self.world.rank:
            return None
        return self.rewards.begin(batch())

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
