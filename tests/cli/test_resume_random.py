"""Runs on random tokens go on for more iterations than they began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puzzle.cli import main
from puzzle.runlog import load_runs

CONFIG = """
iterations: 3
batch: 2
dtype: fp32
device: cpu
actor:
  init: {vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
         num_attention_heads: 2, max_position_embeddings: 32}
  optimizer: {lr: 1.0e-2}
reward: {init: {vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
                num_attention_heads: 2, max_position_embeddings: 32}}
data: {random_tokens: 4}
generation: {max_new_tokens: 4}
log: {provenance: rehearsal, samples: 0, plots: false}
"""


def test_a_longer_run_is_the_same_as_one_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else here depends on how many iterations there are: the learning rate is constant."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    start = ["train", "--config", "run.yaml", "--out"]
    assert main([*start, "whole"]) == 0
    assert main([*start, "parts", "--iterations", "1"]) == 0
    assert main(["train", "--resume", "--out", "parts", "--iterations", "3"]) == 0
    whole, parts = (load_runs(Path(name)).runs[0] for name in ("whole", "parts"))
    assert [i.metrics for i in parts.iterations] == [i.metrics for i in whole.iterations]
    theirs, ours = (load_file(f"{name}/checkpoints/last/model.safetensors") for name in ("whole", "parts"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_begins_with_a_folder_that_has_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models of such runs lie in: its critic is saved, too."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    start = ["train", "--config", "run.yaml", "--iterations", "1", "--out"]
    assert main([*start, "first"]) == 0
    assert main([*start, "second", "--actor.model", "first/checkpoints/last"]) == 0
    assert Path("second/checkpoints/last-critic/config.json").exists()
