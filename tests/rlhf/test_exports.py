"""The folders that a run leaves are models that transformers loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_actor_and_critic_load_in_transformers(tmp_path: Path) -> None:
    options = ["--iterations", "1", "--eval.every", "0", "--log.plots", "false"]
    prompts = ["--data.prompts", str(ROOT / "examples/prompts/sentiment-train.jsonl")]
    held_out = ["--data.eval_prompts", str(ROOT / "examples/prompts/sentiment-held-out.jsonl")]
    config = ["--config", str(ROOT / "examples/tiny.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", *config, *options, *prompts, *held_out]) == 0
    kinds: list[tuple[Any, str]] = [
        (AutoModelForCausalLM, "last"),
        (AutoModelForSequenceClassification, "last-critic"),
    ]
    for kind, name in kinds:
        folder = tmp_path / "run" / "checkpoints" / name
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        assert sum(p.numel() for p in model.parameters()) > 0
    assert model.config.num_labels == 1
    assert model.score.weight.abs().sum() > 0
