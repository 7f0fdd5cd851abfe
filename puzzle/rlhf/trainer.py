"""The PPO run: iterations of generation, inference and training, with their log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.config.resolve import Plan, RunPlan
from puzzle.config.run import TrainConfig
from puzzle.data.prepare import RunData, prepare
from puzzle.data.prompts import Prompt, no_columns
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.files.jsonio import Fields
from puzzle.rlhf.algorithms import make_algorithm
from puzzle.rlhf.algorithms.base import INFERRED
from puzzle.rlhf.algorithms.correction import corrected
from puzzle.rlhf.algorithms.scale import moments
from puzzle.rlhf.controllers import RunningMoments, adapted_kl_coef
from puzzle.rlhf.draw import Draws
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.fusion import FusedPipeline, MakePipeline
from puzzle.rlhf.metrics import (
    device_flops,
    learning_metrics,
    learning_rates,
    memory_metrics,
    response_metrics,
    speed_metrics,
)
from puzzle.rlhf.models import Models, build_models
from puzzle.rlhf.overlong import overlong_metrics, shaped
from puzzle.rlhf.preflight import check_memory, give_up
from puzzle.rlhf.recorder import Recorder, experience_metrics, held_out_metrics
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.weighted import WeightedRewards, function_rewards
from puzzle.rlhf.rollout import (
    Computation,
    compute_scores,
    compute_tokens,
    require_finite,
    require_summable,
    responses_of,
    reward_batch,
    reward_sequences,
    rollout,
    sampling_params,
    texts,
)
from puzzle.rlhf.scoring import Heard, Scorer, Scores
from puzzle.rlhf.session import Session, hold
from puzzle.rlhf.tracer import Tracer
from puzzle.rlhf.train_step import TrainStep
from puzzle.rlhf.vocabulary import agree_on_vocabulary
from puzzle.runlog.records import STAGES, Iteration


def train(
    config: TrainConfig,
    out: Path,
    resume: bool = False,
    note: str = "",
    given: Mapping[str, Any] | None = None,
    moment: str | None = None,
    reward: Callable[..., Any] | None = None,
) -> None:
    """One process of a run, as `session.hold` says. `reward` is the function that the configuration calls
    `given`. Raises UserError for what the user can mend."""
    rewards = function_rewards(config, give_up, reward)

    def make(plan: Plan, began: datetime, world: World) -> Trainer:
        assert isinstance(plan, RunPlan), "the plan of a TrainConfig"
        sizes = [model.spec.vocab_size for model in plan.models.values()]
        # Random tokens are read by every model as they are.
        vocabulary = min(sizes) if config.data.random_tokens else sizes[0]
        # Only the rank that calls the functions keeps what they read.
        choose = no_columns if rewards is None or world.rank else rewards.columns
        data = prepare(config, vocabulary, began, choose)
        check_memory(plan, world)
        world.progress.mark("loading models")
        return Trainer(plan, data, build_models(plan, world), world, rewards)

    longest = 0.0 if rewards is None else rewards.longest
    held = None if rewards is None else closing(rewards)
    hold(config, out, make, resume, note, given, moment, longest, held)


class Trainer(Session):
    """The state that an iteration changes: weights, data position, KL coefficient, reward scale."""

    config: TrainConfig
    models: Models
    make_pipeline: MakePipeline = Pipeline
    """How models are run; another engine's trainer has its own."""

    def __init__(
        self,
        plan: RunPlan,
        data: RunData,
        models: Models,
        world: World,
        rewards: WeightedRewards | None,
    ) -> None:
        """`rewards` are those that are no model's."""
        super().__init__(plan, models, world, data.endings)
        self.plan, self.data, self.models = plan, data, models
        self.config = config = plan.config
        self.kl_coef = config.algorithm.kl.coef
        self.algorithm = make_algorithm(config.algorithm)
        self.scores_seen = RunningMoments()
        self.params = sampling_params(config, data.endings.stop_ids)
        early = config.intra.overlap_rollout is not False
        self.scorer = Scorer(world, config.reward, rewards, early)
        agree_on_vocabulary(config, data, models, data.reader is not None)
        self.training, self.inference = (
            FusedPipeline(
                pipeline.fuse, [models.by_role[role] for role in pipeline.roles], self.make_pipeline
            )
            for pipeline in (plan.training, plan.inference)
        )
        pipelines = {"training": self.training, "inference": self.inference}
        self.tracer = Tracer(world, config.log.trace, config.iterations, pipelines)

    def state(self) -> dict[str, Any]:
        """All but weights and optimizers that a later iteration depends on, as JSON values."""
        return {
            **super().state(),
            "kl_coef": self.kl_coef,
            "scores_seen": dataclasses.asdict(self.scores_seen),
            "data": self.data.train.state(),
        }

    def restore(self, state: Fields) -> None:
        """Go on where `state` was taken."""
        super().restore(state)
        self.data.train.restore(state.section("data").values)
        self.kl_coef = state.number("kl_coef")
        seen = state.section("scores_seen")
        names = [field.name for field in dataclasses.fields(RunningMoments)]
        self.scores_seen = RunningMoments(**{name: seen.number(name) for name in names})

    def run(self, recorder: Recorder, checkpoints: Checkpoints) -> None:
        """All iterations; then what generation has kept is given back."""
        with self.models.generator:
            super().run(recorder, checkpoints)

    def remarks(self) -> Sequence[str]:
        """Prompts that are left out."""
        sets = (self.data.train.prompts, self.data.held_out)
        return [remark for prompts in filter(None, sets) for remark in prompts.remarks]

    def stops(self, metrics: Mapping[str, float]) -> str | None:
        """Where KL exceeds the limit that was set."""
        limit = self.config.algorithm.kl_stop
        if limit is None or not metrics["kl"] > limit:
            return None
        return f"KL {metrics['kl']:.4g} exceeded algorithm.kl_stop {limit:g}"

    def quality(self, metrics: Mapping[str, float]) -> float:
        """The mean held-out reward."""
        return metrics["reward"]

    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One iteration; its metrics, equal on every rank."""
        doing = self.world.progress.mark
        doing(f"iteration {iteration}, generation")
        clock = StageClock(self.world)
        self.tracer.start(iteration)
        greedy = self.algorithm.wants_greedy
        draws = Draws(self.config, self.data, self.models, self.params, greedy, self.score, self._listen)
        prompts, experience, sampling = draws.iteration(iteration, clock)
        doing(f"iteration {iteration}, inference")
        experience, scores = self._inference(experience, prompts)
        weights_BS, correction = corrected(experience, self.config.algorithm.correction)
        experience = dataclasses.replace(experience, correction_BS=weights_BS)
        clock.end("inference")
        self.models.offload.for_training()
        doing(f"iteration {iteration}, training")
        step = self._train_step(experience)
        step.run(iteration, self.models.generator.before_last_step)
        self.models.generator.end_training()
        for model in self.models.trained.values():
            assert model.optimizer is not None
            model.optimizer.release()  # awaits the weights of the last step, which belong to training
        clock.end("training")
        metrics = experience_metrics(experience, scores.total_B, self.config.algorithm.kl.estimator)
        metrics |= sampling | correction | overlong_metrics(experience, self.config)
        metrics |= {**scores.metrics(), **step.metrics(), "kl_coef": self.kl_coef}
        self._adapt(metrics, len(experience))
        seconds, total = clock.seconds(STAGES)
        self.note_peaks(clock)
        longest = self.config.generation.max_new_tokens
        metrics |= response_metrics(experience, scores.total_B, prompts, self.data.endings, longest)
        metrics |= learning_metrics(experience) | learning_rates(self.models.trained)
        speed = speed_metrics(self.plan, experience, seconds, total, device_flops(self.world.device))
        speed |= memory_metrics(self.world, clock.peaks)
        recorder.write(Iteration(iteration, seconds, total, metrics, self.scorer.spent(), speed))
        recorder.write(self.models.generator.record(self.world, iteration))
        recorder.write(self.models.offload.record(iteration))
        recorder.samples(iteration, experience, prompts, self._texts(experience, prompts), scores)
        self.tracer.read(iteration, clock, recorder)
        return metrics

    def _train_step(self, experience: Experience) -> TrainStep:
        return TrainStep(self.algorithm, self.models, self.config, experience, self.kl_coef, self.training)

    def _inference(self, experience: Experience, prompts: Sequence[Prompt]) -> tuple[Experience, Scores]:
        """The experience with all that training needs, and the raw scores. Functions compute beside the
        models."""
        pending = None
        if experience.scores_B is None:  # what was drawn for its scores has them
            pending = self.scorer.begin(lambda: self._reward_batch(experience, prompts))
        asked = {
            INFERRED[role]: self._question(role, experience, prompts) for role in self.plan.inference.roles
        }
        results = self.inference.infer([question.input for question in asked.values()]) if asked else []
        answers = {
            name: question.answer(stage.results)
            for (name, question), stage in zip(asked.items(), results, strict=True)
        }
        model_B = answers.pop("scores_B", None)
        if experience.scores_B is None:
            found_scores = self.scorer.finish(pending, model_B)
        else:
            found_scores = Scores(experience.scores_B, experience.score_parts or {})
        raw = found_scores.total_B
        experience = dataclasses.replace(experience, **answers)
        scores, greedy_scores_P = shaped(experience, raw, self.config), experience.greedy_scores_P
        if self.config.algorithm.reward_norm:
            everywhere = torch.ones_like(scores, dtype=torch.bool)
            self.scores_seen = self.scores_seen.merged(moments(scores, everywhere))
            scores = self.scores_seen.scaled(scores)
            if greedy_scores_P is not None:
                greedy_scores_P = self.scores_seen.scaled(greedy_scores_P)
        experience = dataclasses.replace(experience, greedy_scores_P=greedy_scores_P)
        found = {
            "actor: a log-prob": experience.logprobs_BS,
            "reference: a log-prob": experience.ref_logprobs_BS,
            "critic: a value": experience.values_BS,
            "reward: the score": raw[:, None],
        }
        require_finite(experience, found)
        experience = self.algorithm.advantages(experience, scores, self.kl_coef)
        require_summable(experience, raw)
        return experience, found_scores

    def _question(self, role: str, experience: Experience, prompts: Sequence[Prompt]) -> Computation:
        """What a role's model computes of the responses: scores, log-probs or values."""
        model = self.models.by_role[role]
        if INFERRED[role] == "scores_B":
            return self._about_rewards(model, experience, prompts)
        temperature = self.params.temperature if model.spec.head == "lm" else None
        return compute_tokens(model, experience, self.config.algorithm, temperature)

    def _about_rewards(
        self, reward: ModelRuntime, experience: Experience, prompts: Sequence[Prompt]
    ) -> Computation:
        stops = self.config.generation.stop
        data = self.data
        sequences = reward_sequences(experience, prompts, data.tokenizer, data.reader, stops, data.reward_pad)
        return compute_scores(reward, sequences, self.config.algorithm)

    def _listen(self, actor: ModelRuntime, prompts: Sequence[Prompt]) -> Heard | None:
        """What hears of responses to the prompts as they end."""
        samples = self.config.generation.samples

        def one(row: int, tokens: Sequence[int]) -> RewardBatch:
            prompt = prompts[row // samples]
            alone = Experience((prompt.tokens,), (prompt.index,), (tuple(tokens),))
            return self._reward_batch(alone, [prompt])

        return self.scorer.listen(actor, len(prompts) * samples, one)

    def score(self, experience: Experience, prompts: Sequence[Prompt]) -> Scores:
        """What every row scores, for those who cannot wait for inference."""
        pending = self.scorer.begin(lambda: self._reward_batch(experience, prompts))
        models = self.models.by_role
        return self.scorer.finish(
            pending, self._model_scores(experience, prompts) if "reward" in models else None
        )

    def _model_scores(self, experience: Experience, prompts: Sequence[Prompt]) -> Tensor:
        """float32 (B,): the reward model's score of every row."""
        reward = self.models.by_role["reward"]
        question = self._about_rewards(reward, experience, prompts)
        (output,) = self.make_pipeline([reward]).infer([question.input])
        return question.answer(output.results)

    def _reward_batch(self, experience: Experience, prompts: Sequence[Prompt]) -> RewardBatch:
        said, longest = self._texts(experience, prompts), self.config.generation.max_new_tokens
        return reward_batch(experience, prompts, said, self.data.endings, longest)

    def _texts(self, experience: Experience, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]]:
        return texts(experience, prompts, self.data.tokenizer, self.config.generation.stop)

    def _adapt(self, metrics: dict[str, float], responses: int) -> None:
        kl = self.config.algorithm.kl
        if kl.target is not None:
            observed = metrics["kl_response"]
            self.kl_coef = adapted_kl_coef(self.kl_coef, observed, kl.target, responses, kl.horizon)

    def held_out(self, done: int, recorder: Recorder) -> dict[str, float] | None:
        """Held-out reward with noise that is the same at every evaluation.

        Prompts come in parts of a training batch, for which there is memory.
        """
        if self.data.held_out is None:
            return None
        prompts, size = self.data.held_out.prompts, self.config.batch * self.config.generation.samples
        params = dataclasses.replace(
            self.params, greedy=self.config.eval.greedy or self.params.greedy, seed=self.config.seed + 1
        )
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        with self.models.generator.weights() as actor:
            self.models.offload.for_generation()
            how = (params, 0, self.config.generation, self.data.endings, self.models.generator.passes)
            answers = [rollout(actor, part, 1, *how) for part in parts]
        experience = responses_of(answers)
        # A function may compare responses: it gets them all.
        pending = self.scorer.begin(lambda: self._reward_batch(experience, prompts))
        model_B = None
        if "reward" in self.models.by_role:
            model_B = torch.cat([self._model_scores(*pair) for pair in zip(answers, parts, strict=True)])
        scores = self.scorer.finish(pending, model_B)
        require_finite(experience, {"reward: the score": scores.total_B[:, None]})
        self.scorer.spent()  # which is no iteration's
        recorder.samples(done, experience, prompts, self._texts(experience, prompts), scores, held_out=True)
        return held_out_metrics(scores.total_B) | scores.metrics()
