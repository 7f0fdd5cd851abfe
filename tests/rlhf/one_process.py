"""A whole run in this process, on models of a few thousand parameters, with all that it would log."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.data.endings import Endings
from puzzle.data.prepare import RunData
from puzzle.data.prompts import Prompt, PromptSet, PromptStream
from puzzle.engine.runtime.world import World
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import build_models
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.rlhf.scoring import Scores
from puzzle.rlhf.trainer import Trainer
from puzzle.runlog.record import Record
from puzzle.runlog.records import Evaluation, Iteration

VOCAB = 40
INIT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


class Log:
    """In the place of a Recorder."""

    def __init__(self) -> None:
        self.note: str | None = None
        self.iterations: list[Iteration] = []
        self.metrics: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.experiences: list[Experience] = []
        self.held_out: list[tuple[Experience, list[float]]] = []
        self.saved: list[tuple[str, int]] = []

    def write(self, *records: Record | None) -> None:
        for record in records:
            match record:
                case Iteration():
                    assert record.iteration == len(self.metrics)
                    self.iterations.append(record)
                    self.metrics.append(dict(record.metrics))
                case Evaluation():
                    self.evaluations.append((record.iteration, dict(record.metrics)))

    def samples(
        self,
        _number: int,
        experience: Experience,
        _prompts: object,
        _said: object,
        scores: Scores,
        held_out: bool = False,
    ) -> None:
        if held_out:
            self.held_out.append((experience, scores.total_B.tolist()))
        else:
            self.experiences.append(experience)

    def save(self, model: Any, name: str, done: int, _endings: object) -> None:
        if model.name == "actor":
            self.saved.append((name, done))

    def profiled(self, _iteration: int) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class NoCheckpoints:
    """In the place of Checkpoints."""

    def finished(self) -> list[Any]:
        return []

    def save(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass


def prompts_of(count: int, seed: int, first: int = 0) -> PromptSet:
    """Random prompts of 1 to 6 tokens, whose texts are `prompt N`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    tokens = [tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return PromptSet(
        tuple(Prompt(first + i, str(i), f"prompt {first + i}", None, t) for i, t in enumerate(tokens))
    )


def configured(**options: Any) -> TrainConfig:
    """A configuration with these sections over the small defaults."""
    config: dict[str, Any] = {
        "iterations": 2,
        "batch": 4,
        "seed": 3,
        "checkpoint": {"save": False},
        "data": {"prompts": "given", "eval_prompts": "given", "tokenizer": "bytes", "max_prompt_tokens": 8},
        "reward": {"init": INIT},
        "log": {"trace": []},
    }
    for key, value in options.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    if "function" in config["reward"]:
        config["reward"] = {"function": config["reward"]["function"], "workers": 0}
    config["generation"] = {"max_new_tokens": 5, **options.get("generation", {})}
    config["actor"] = {"init": INIT, **options.get("actor", {})}
    return TrainConfig.model_validate(config)


def trainer_of(config: TrainConfig, held_out: int = 7, stop_ids: Sequence[int] = (7, 11)) -> Trainer:
    """The trainer of a run of this process alone."""
    world = World(0, 1, torch.device("cpu"))
    plan = resolve(config)
    stream = PromptStream(prompts_of(11, 1), config.batch, config.seed, shuffle=True)
    data = RunData(
        None, Endings(tuple(stop_ids), tuple(stop_ids)), stream, prompts_of(held_out, 2, first=100)
    )
    return Trainer(plan, data, build_models(plan, world), world, function_rewards(config))


def run(trainer: Trainer) -> Log:
    """All iterations."""
    log = Log()
    trainer.run(log, NoCheckpoints())  # ty: ignore[invalid-argument-type]
    return log
