"""Answers of a model to prompts, drawn and scored as a run's rollouts are, and what they say of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.sources import layout_of, spec_of
from puzzle.data.endings import Endings, endings
from puzzle.data.prepare import reader_of, reward_pad_of
from puzzle.data.prompts import Prompt, load_prompts, no_columns
from puzzle.data.reading import Reader
from puzzle.data.records import drop_is_a_remedy
from puzzle.data.tokenizers import Tokenizer, load_tokenizer
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files import durable
from puzzle.plan.layout import Placement
from puzzle.plan.run import ModelPlan
from puzzle.rlhf.estimators import majority_at, pass_at
from puzzle.rlhf.models import load_model
from puzzle.rlhf.preflight import give_up
from puzzle.rlhf.rewards.builtin import said_answer
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.rlhf.rollout import (
    compute_scores,
    require_finite,
    responses_of,
    reward_batch,
    reward_sequences,
    rollout,
    sampling_params,
    texts,
)
from puzzle.rlhf.scoring import Scorer, Scores


def process(values: dict[str, Any], out: str | None) -> None:
    """One process of an evaluation, from JSON values; rank 0 prints and writes. Raises UserError."""
    config = EvaluationConfig.model_validate(values)
    rewards = function_rewards(config, give_up)
    with World.start(config.device, share_device=config.launch.share_device) as world:
        try:
            choose = no_columns if rewards is None or world.rank else rewards.columns
            Evaluation(config, world, choose).run(Scorer(world, config.reward, rewards), out)
        finally:
            if rewards is not None:
                rewards.close()


class Evaluation:
    """The models and prompts of one; equal calls on every rank."""

    def __init__(self, config: EvaluationConfig, world: World, choose: Any) -> None:
        self.config, self.world = config, world
        name, folder = config.data.tokenizer or config.actor.model, config.actor.model
        assert name is not None, "validated by the configuration"
        assert config.data.prompts is not None, "validated by the configuration"
        began = datetime.now().astimezone()
        self.tokenizer: Tokenizer = load_tokenizer(name)
        self.endings: Endings = endings(
            self.tokenizer, None if folder is None else Path(folder), config.generation.stop
        )
        path = Path(config.data.prompts)
        with drop_is_a_remedy():
            found = load_prompts(path, config.data, self.tokenizer, began, choose)
        self.prompts = found.prompts
        for remark in found.remarks if world.rank == 0 else ():
            print(f"note: {remark}", file=sys.stderr)
        self.reader: Reader | None = reader_of(config.reward, self.tokenizer, self.endings, began)
        self.actor = self._model("actor")
        self.reward = self._model("reward") if config.reward.has_model else None
        self._check()

    def _model(self, role: Any) -> ModelRuntime:
        source = getattr(self.config, role)
        spec = spec_of(role, source)
        plan = ModelPlan(role, spec, Placement.default(layout_of(role, source.layout, spec)), False)
        self.world.progress.mark(f"loading {role}")
        model = load_model(plan, source, self.world, self.config.dtype, self.config.seed)
        model.freeze()
        return model

    def _check(self) -> None:
        spec, longest = self.actor.spec, max(len(prompt.tokens) for prompt in self.prompts)
        largest = max(max(prompt.tokens) for prompt in self.prompts)
        if largest >= spec.vocab_size:
            raise UserError(
                f"the tokenizer gives token {largest}, the actor's vocabulary has {spec.vocab_size}"
            )
        if longest + self.config.generation.max_new_tokens > spec.max_positions:
            raise UserError(
                f"actor: {longest} prompt and {self.config.generation.max_new_tokens} new tokens exceed its"
                f" {spec.max_positions} positions; lower generation.max_new_tokens"
            )

    def run(self, scorer: Scorer, out: str | None) -> None:
        """Answer, score, and on rank 0 print and write."""
        config, generation = self.config, self.config.generation
        params = sampling_params(config, self.endings.stop_ids)
        parts = [self.prompts[i : i + config.batch] for i in range(0, len(self.prompts), config.batch)]
        answers = []
        for number, part in enumerate(parts):
            self.world.progress.mark(f"answers, part {number + 1} of {len(parts)}")
            answers.append(rollout(self.actor, part, generation.samples, params, 0, generation, self.endings))
        whole = responses_of(answers)
        said = texts(whole, self.prompts, self.tokenizer, generation.stop)
        batch = reward_batch(whole, self.prompts, said, self.endings, generation.max_new_tokens)
        scores = None
        if self.reward is not None or scorer.rewards is not None:
            pending = scorer.begin(lambda: batch)
            model_B = None
            if self.reward is not None:
                model_B = torch.cat([self._scores(*pair) for pair in zip(answers, parts, strict=True)])
            scores = scorer.finish(pending, model_B)
            require_finite(whole, {"reward: the score": scores.total_B[:, None]})
        if self.world.rank:
            return
        lengths = [len(response) for response in whole.responses]
        found = summary(scores, said[1], generation.samples, lengths, batch.finished)
        print(table(found, len(self.prompts), generation.samples))
        if out is not None:
            self._write(Path(out), found, said, scores)

    def _scores(self, experience: Any, prompts: Sequence[Prompt]) -> Tensor:
        """float32 (B,): the reward model's score of every row."""
        assert self.reward is not None
        stops = self.config.generation.stop
        pad = reward_pad_of(self.config.reward, self.endings, self.reader)
        sequences = reward_sequences(experience, prompts, self.tokenizer, self.reader, stops, pad)
        question = compute_scores(self.reward, sequences, self.config.algorithm)
        (output,) = Pipeline([self.reward]).infer([question.input])
        return question.answer(output.results)

    def _write(
        self,
        out: Path,
        found: Mapping[str, float],
        said: tuple[Sequence[str], Sequence[str]],
        scores: Scores | None,
    ) -> None:
        """evaluation.json and samples.jsonl, each whole or not at all."""
        samples, rows = self.config.generation.samples, []
        for row, response in enumerate(said[1]):
            prompt = self.prompts[row // samples]
            line = {"prompt_id": prompt.id, "sample": row % samples, "prompt": said[0][row]}
            line["response"] = response
            if scores is not None:
                line["reward"] = float(scores.total_B[row])
                if scores.parts:
                    line["rewards"] = {name: float(part[row]) for name, part in scores.parts.items()}
            rows.append(json.dumps(line, ensure_ascii=False))
        durable.make_folder(out)
        durable.write_text(out / "samples.jsonl", "\n".join(rows) + "\n")
        told = {"metrics": dict(found), "config": self.config.model_dump(mode="json")}
        durable.write_text(out / "evaluation.json", json.dumps(told, indent=2) + "\n")
        print(f"{out}: evaluation.json, samples.jsonl", file=sys.stderr)


def summary(
    scores: Scores | None,
    responses: Sequence[str],
    samples: int,
    lengths: Sequence[int],
    finished: Sequence[bool],
) -> dict[str, float]:
    """Metrics of `samples` responses to each of some prompts, those of a prompt one after the other.

    The interval is over prompts, whose samples are not independent. Scores that are all 0 or 1 say which
    responses are right: `pass@k` and `maj@k` for k = 1, 2, 4, ... up to `samples`.
    """
    found = {
        "response_length": sum(lengths) / len(lengths),
        "truncated_frac": 1.0 - sum(finished) / len(finished),
    }
    if scores is None:
        return found
    scores_PS = scores.total_B.double().cpu().reshape(-1, samples)
    means_P = scores_PS.mean(1)
    found = {"reward": float(means_P.mean())} | found
    if len(means_P) > 1:
        found["reward_ci95"] = 1.96 * float(means_P.std()) / len(means_P) ** 0.5
    found |= {f"reward.{name}": float(part.mean()) for name, part in scores.parts.items()}
    if not bool(((scores_PS == 0) | (scores_PS == 1)).all()):
        return found
    right_PS = (scores_PS == 1).tolist()
    answers = [
        # What is right counts as one answer, however it is written.
        ["right" if right else ("wrong", said_answer(text)) for right, text in zip(own, said, strict=True)]
        for own, said in zip(right_PS, _grouped(responses, samples), strict=True)
    ]
    k = 1
    while k <= samples:
        passed = [pass_at(sum(own), samples, k) for own in right_PS]
        voted = [majority_at(said, own, k) for said, own in zip(answers, right_PS, strict=True)]
        found |= {f"pass@{k}": sum(passed) / len(passed), f"maj@{k}": sum(voted) / len(voted)}
        k *= 2
    return found


def _grouped(rows: Sequence[str], size: int) -> list[Sequence[str]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def table(found: Mapping[str, float], prompts: int, samples: int) -> str:
    """The metrics as lines for people, an interval beside its mean."""
    lines = [f"{prompts} prompts, {samples} responses each"]
    for name, value in found.items():
        if not name.endswith("_ci95"):
            half = found.get(f"{name}_ci95")
            lines.append(f"  {name:<20}{value:10.4f}" + ("" if half is None else f" +- {half:.4f}"))
    return "\n".join(lines)
