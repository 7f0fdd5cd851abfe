"""The PPO run: iterations of generation, inference and training, with their log."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.config import TrainConfig
from puzzle.data.prepare import RunData, prepare
from puzzle.data.prompts import Prompt
from puzzle.data.tokenizers import Tokenizer, load_tokenizer, same_tokenizer
from puzzle.engine.timing import StageClock
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.provenance import run_header
from puzzle.rlhf import ppo
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import Models, build_models
from puzzle.rlhf.records import Recorder, describe_rank, experience_metrics
from puzzle.rlhf.rewards import FunctionReward
from puzzle.rlhf.rollout import (
    infer,
    model_scores,
    respond,
    reward_sequences,
    sampling_params,
    texts,
    with_advantages,
)
from puzzle.rlhf.update import Update
from puzzle.runlog import STAGES
from puzzle.sources import check, specs_of


def train(config: TrainConfig, out: Path) -> None:
    """One process of a run; all of them call this. Raises UserError for what the user can mend."""
    check(config)
    data = prepare(config, specs_of(config)["actor"].vocab_size)
    world = World.start(config.device)
    try:
        trainer = Trainer(config, data, build_models(config, world), world)
        header = run_header(config, {"device": _device_name(world), "processes": world.size})
        with Recorder(out, config, world, header) as recorder:
            trainer.run(recorder)
    finally:
        world.close()


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


class Trainer:
    """The state that an iteration changes: weights, data position, KL coefficient, reward scale."""

    def __init__(self, config: TrainConfig, data: RunData, models: Models, world: World) -> None:
        self.config, self.data, self.models, self.world = config, data, models, world
        self.kl_coef = config.ppo.kl.coef
        self.scores_seen = ppo.RunningMoments()
        self.params = sampling_params(config, data.stop_ids)
        self.function = FunctionReward(config.reward.function) if config.reward.function else None
        self.reward_tokenizer = self._reward_tokenizer()
        self.best = -math.inf

    def _reward_tokenizer(self) -> Tokenizer | None:
        """The reward model's tokenizer where it differs from the actor's."""
        folder, ours = self.config.reward.model, self.data.tokenizer
        if folder is None or ours is None:
            return None
        theirs = load_tokenizer(folder)
        return None if same_tokenizer(ours, theirs) else theirs

    def run(self, recorder: Recorder) -> None:
        """All iterations, with evaluations and checkpoints between them."""
        recorder.ranks(describe_rank(self.models, self.world))
        self._evaluate(0, recorder)
        for iteration in range(self.config.iterations):
            metrics = self.iteration(iteration, recorder)
            done = iteration + 1
            every = self.config.eval.every
            if every and done % every == 0:
                self._evaluate(done, recorder)
            every = self.config.checkpoint.every
            if every and done % every == 0 and done < self.config.iterations:
                recorder.save(self.models.actor, f"iteration-{done}", done)
            stop = self.config.ppo.kl_stop
            if stop is not None and metrics["kl"] > stop:
                recorder.note = f"KL {metrics['kl']:.4g} exceeded ppo.kl_stop {stop:g}"
                break
        recorder.save(self.models.actor, "last", done)
        recorder.ranks(describe_rank(self.models, self.world))

    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One PPO iteration; its metrics, equal on every rank."""
        prompts = self.data.train.next()
        clock = StageClock(self.world)
        experience = respond(
            self.models.actor, prompts, self.config.generation.samples, self.params, iteration
        )
        clock.end("generation")
        experience, scores = self._inference(experience, prompts)
        clock.end("inference")
        update = Update(self.models, self.config, experience, self.kl_coef)
        update.run(iteration)
        clock.end("training")
        metrics = experience_metrics(experience, scores, self.config.ppo.kl.estimator)
        metrics |= {**update.metrics(), "kl_coef": self.kl_coef}
        self._adapt(metrics, len(experience))
        seconds, total = clock.seconds(STAGES)
        recorder.iteration(iteration, seconds, total, metrics)
        recorder.samples(iteration, experience, texts(experience, prompts, self.data.tokenizer), scores)
        for model in (self.models.actor, self.models.critic):
            assert model.optimizer is not None
            model.optimizer.release()
        return metrics

    def _inference(self, experience: Experience, prompts: Sequence[Prompt]) -> tuple[Experience, Tensor]:
        """The experience with all that training needs, and the raw scores (B,)."""
        c = self.config.ppo
        temperature = self.params.temperature
        found: dict[str, Any] = {}
        if c.old_logprobs == "recompute":
            found["logprobs_BS"] = infer(self.models.actor, experience, c, temperature)
        if self.models.reference is not None:
            found["ref_logprobs_BS"] = infer(self.models.reference, experience, c, temperature)
        found["values_BS"] = infer(self.models.critic, experience, c, None)
        experience = dataclasses.replace(experience, **found)
        raw = self.score(experience, prompts)
        scores = raw
        if c.reward_norm:
            everywhere = torch.ones_like(raw, dtype=torch.bool)
            self.scores_seen = self.scores_seen.merged(ppo.moments(raw, everywhere))
            scores = self.scores_seen.scaled(raw)
        return with_advantages(experience, scores, c, self.kl_coef), raw

    def score(self, experience: Experience, prompts: Sequence[Prompt]) -> Tensor:
        """float32 (B,): the reward of every row."""
        if self.models.reward is not None:
            sequences = reward_sequences(experience, prompts, self.data.tokenizer, self.reward_tokenizer)
            return model_scores(self.models.reward, sequences, self.config.ppo)
        assert self.function is not None
        found: list[float] | UserError = []
        if self.world.rank == 0:
            try:
                found = self.function(*texts(experience, prompts, self.data.tokenizer))
            except UserError as error:
                found = error
        found = self.world.share(found)
        if isinstance(found, UserError):
            raise found
        return torch.tensor(found, dtype=torch.float32, device=self.world.device)

    def _adapt(self, metrics: dict[str, float], responses: int) -> None:
        kl = self.config.ppo.kl
        if kl.target is not None:
            observed = metrics["kl_response"]
            self.kl_coef = ppo.adapted_kl_coef(self.kl_coef, observed, kl.target, responses, kl.horizon)

    def _evaluate(self, done: int, recorder: Recorder) -> None:
        """Held-out reward with noise that is the same at every evaluation."""
        if not self.config.eval.every or self.data.held_out is None:
            return
        prompts = self.data.held_out.prompts
        params = dataclasses.replace(
            self.params, greedy=self.config.eval.greedy or self.params.greedy, seed=self.config.seed + 1
        )
        experience = respond(self.models.actor, prompts, 1, params, 0)
        scores = self.score(experience, prompts)
        reward = float(scores.mean())
        error = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else 0.0
        recorder.evaluation(done, {"reward": reward, "reward_ci95": 1.96 * error})
        recorder.samples(
            done, experience, texts(experience, prompts, self.data.tokenizer), scores, held_out=True
        )
        if self.config.checkpoint.best and reward > self.best:
            recorder.save(self.models.actor, "best", done)
        self.best = max(self.best, reward)
