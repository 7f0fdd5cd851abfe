"""Runs as a launcher starts them, in this process, over files of a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzle.config.base import RunConfig
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SupervisedConfig, config_of
from puzzle.rlhf import trainer
from puzzle.rlhf.supervised import trainer as supervised
from tests.rlhf.one_process import INIT

MODEL = {**INIT, "vocab_size": 262}
ROWS = {
    "prompts": [{"prompt": f"ask {n}"} for n in range(5)],
    "held_out": [{"prompt": f"test {n}"} for n in range(3)],
    "sft": [{"prompt": f"ask {n}", "response": "yes" * n + "."} for n in range(5)],
    "pairs": [{"prompt": f"ask {n}", "chosen": "good" * n + ".", "rejected": "bad."} for n in range(5)],
}
TASKS = ("rl", "sft", "reward-model", "dpo")


def laid_out(tmp_path: Path) -> Path:
    """A fixture: a folder with those files."""
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(folder: Path, task: str, **changes: Any) -> RunConfig:
    """A run of two iterations over those files."""
    file = {"rl": "prompts", "sft": "sft"}.get(task, "pairs")
    role = "reward" if task == "reward-model" else "actor"
    data: dict[str, Any] = {"tokenizer": "bytes"}
    values: dict[str, Any] = {
        "iterations": 2,
        "batch": 2,
        "device": "cpu",
        role: {"init": MODEL},
        "data": data,
        "eval": {"every": 1},
        "log": {"plots": False},
    }
    if task == "rl":
        data |= {"prompts": f"{folder}/prompts.jsonl", "eval_prompts": f"{folder}/held_out.jsonl"}
        data["max_prompt_tokens"] = 8
        values |= {"reward": {"init": MODEL}, "generation": {"max_new_tokens": 4}}
    else:
        data |= dict.fromkeys(("examples", "eval_examples"), f"{folder}/{file}.jsonl")
        data["max_tokens"] = 40
        values["task"] = task
    for name, value in changes.items():
        merged = isinstance(value, dict) and name != "reward" and name in values
        values[name] = {**values[name], **value} if merged else value
    return TrainConfig.model_validate(values) if task == "rl" else config_of(values)


def start(config: RunConfig, out: Path, *more: Any) -> list[dict[str, Any]]:
    """Run it, and read its log."""
    if isinstance(config, SupervisedConfig):
        supervised.learn(config, out, *more)
    else:
        assert isinstance(config, TrainConfig)
        trainer.train(config, out, *more)
    return [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines() if line]


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of a kind."""
    return [record for record in records if record["record"] == kind]
