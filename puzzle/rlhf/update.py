"""Optimizer steps of actor and critic on one experience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puzzle.config import TrainConfig
from puzzle.engine.pipeline import PipelineInput
from puzzle.engine.runtime import ModelRuntime
from puzzle.rlhf import ppo
from puzzle.rlhf.experience import Experience, minibatches
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.models import Models
from puzzle.rlhf.rollout import Cut


class Part(NamedTuple):
    """What the loss of a micro-batch reads, ready on the device before the pipeline starts."""

    states_N: Tensor
    targets_N: Tensor
    taken: dict[str, Tensor]


class Update:
    """The optimizer steps of one iteration; `metrics()` afterwards, on every rank."""

    def __init__(
        self,
        models: Models,
        config: TrainConfig,
        experience: Experience,
        kl_coef: float,
        pipeline: FusedPipeline,
    ) -> None:
        self.models, self.config, self.experience, self.kl_coef = models, config, experience, kl_coef
        self.pipeline = pipeline
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        # Of the first step: ratios' sum, how many they are, and the furthest from 1.
        self._first = torch.zeros(3, dtype=torch.float64, device=models.actor.world.device)

    def run(self, iteration: int, before_last: Callable[[], None] = lambda: None) -> None:
        """All epochs and minibatches; `before_last` is called before the last optimizer step."""
        size, seed, epochs = self.config.minibatch, self.config.seed, range(self.config.ppo.epochs)
        count = len(self.experience)
        cuts = [rows for epoch in epochs for rows in minibatches(count, size, seed, iteration, epoch)]
        trained = (self.models.actor, self.models.critic)
        for number, rows in enumerate(cuts, 1):
            if number == len(cuts):
                before_last()
            self.pipeline.train([self._input(model, rows) for model in trained])
            self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Averages over the tokens of all steps, and mean gradient norms; UserError for one not finite."""
        names = sorted(self._names())
        device = self.models.actor.world.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        summed = self.models.actor.world.sum(
            torch.stack([self._sums.get(name, zero).to(device, torch.float64) for name in names])
        )
        found = dict(zip(names, summed.tolist(), strict=True))
        out = {
            "actor_loss": found["actor.loss"] / self._steps,
            "critic_loss": found["critic.loss"] / self._steps,
            "clip_share": found["actor.clipped"] / found["actor.tokens"],
            "approx_kl": found["actor.approx_kl"] / found["actor.tokens"],
            "value_clip_share": found["critic.clipped"] / found["critic.tokens"],
            "value_error": found["critic.squared_error"] / found["critic.tokens"],
        }
        for model in (self.models.actor, self.models.critic):
            assert model.optimizer is not None
            norms = model.optimizer.take_norms()
            out[f"{model.name}_grad_norm"] = sum(norms) / len(norms)
        return out | self._first_ratio()

    def _first_ratio(self) -> dict[str, float]:
        """Of the policy before any step to the one that PPO starts from: 1, but for rounding."""
        world = self.models.actor.world
        furthest = float(world.max(self._first[2:].clone()))
        total, count = world.sum(self._first[:2].clone()).tolist()
        return {"first_ratio": total / count, "first_ratio_gap": furthest}

    @staticmethod
    def _names() -> list[str]:
        fields = {"actor": ppo.ActorSums._fields, "critic": ppo.CriticSums._fields}
        return [f"{role}.{field}" for role, names in fields.items() for field in names]

    def _input(self, model: ModelRuntime, rows: Sequence[int]) -> PipelineInput:
        """The part of one model in the optimizer step on the minibatch `rows` (of all replicas)."""
        cut = Cut(model, rows, [self.experience.sequence(row) for row in rows], self.config.ppo)
        weights = self._weights(rows, cut)
        actor = model is self.models.actor
        last = model.coord.p == model.placement.layout.pp - 1
        parts = [self._part(actor, cut, i) for i in range(len(cut.rows))] if last else []

        def loss_fn(index: int, hidden: Tensor) -> Tensor:
            sums = self._actor(hidden, parts[index]) if actor else self._critic(hidden, parts[index])
            loss = sums.loss * weights[index]
            if model.owns_results:
                self._add(model.name, sums._replace(loss=loss.detach()))
            return loss

        return PipelineInput(model, cut.batches, loss_fn, max(cut.passes))

    def _weights(self, rows: Sequence[int], cut: Cut) -> list[float]:
        """What each micro-batch's sum is multiplied with; over all replicas they make the loss an average."""
        if self.config.ppo.loss_average == "token":
            return [1.0 / self.experience.tokens(rows)] * len(cut.rows)
        passes = sum(cut.passes)
        return [1.0 / (passes * self.experience.tokens(part)) for part in cut.rows]

    def _part(self, actor: bool, cut: Cut, index: int) -> Part:
        e, rows = self.experience, cut.rows[index]
        tensors = {"values": e.values_BS, "returns": e.returns_BS}
        if actor:
            tensors = {"logprobs": e.logprobs_BS, "advantages": e.advantages_BS}
            if self.config.ppo.kl.place == "loss":
                tensors["reference"] = e.ref_logprobs_BS
        taken = {name: e.take_N(x_BS, rows) for name, x_BS in tensors.items() if x_BS is not None}
        states_N = cut.states_N(e, index)
        return Part(states_N, e.targets_N(rows).to(states_N.device), taken)

    def _actor(self, hidden: Tensor, part: Part) -> ppo.ActorSums:
        c, old = self.config.ppo, part.taken["logprobs"]
        stats = self.models.actor.decoder.token_stats(
            hidden,
            part.states_N,
            part.targets_N,
            self.config.generation.temperature,
            entropy=c.entropy > 0,
        )
        if self._steps == 0 and self.models.actor.owns_results:
            ratio = (stats.logprobs.detach() - old).exp()
            self._first[0] += ratio.sum()
            self._first[1] += len(ratio)
            self._first[2] = torch.maximum(self._first[2], (ratio - 1).abs().max())
        return ppo.actor_loss(
            stats.logprobs,
            old,
            part.taken["advantages"],
            torch.ones_like(stats.logprobs, dtype=torch.bool),
            clip=c.clip,
            entropy=stats.entropy,
            entropy_coef=c.entropy,
            ref_logprobs=part.taken.get("reference"),
            kl_coef=self.kl_coef,
            kl_estimator=c.kl.estimator,
        )

    def _critic(self, hidden: Tensor, part: Part) -> ppo.CriticSums:
        values = self.models.critic.decoder.values(hidden)[part.states_N]
        return ppo.critic_loss(
            values,
            part.taken["values"],
            part.taken["returns"],
            torch.ones_like(values, dtype=torch.bool),
            clip=self.config.ppo.value_clip,
        )

    def _add(self, role: str, sums: Any) -> None:
        for field, value in sums._asdict().items():
            name = f"{role}.{field}"
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
