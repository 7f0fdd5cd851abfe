"""PPO with everything offloaded that can be: bit for bit the run without, whatever else is switched on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.runlog import Run, load_runs

CONFIG = """\
iterations: 3
batch: 4
device: cpu
dtype: bf16
actor:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4,
         num_attention_heads: 4, max_position_embeddings: 64}
  optimizer: {lr: 1.0e-3}
reward:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4,
         num_attention_heads: 4, max_position_embeddings: 64}
data: {prompts: prompts.jsonl, eval_prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 16}
generation: {max_new_tokens: 4}
eval: {every: 1}
algorithm: {minibatch: 2, microbatch: 1}
checkpoint: {every: 1}
log: {plots: false}
"""
ALL = [f"--offload.{what}=true" for what in ("optimizer", "reference", "reward")]
SWITCHED = [
    "--dtype",
    "fp32",
    "--layout.pp",
    "2",
    "--generation.layout.tp",
    "2",
    "--generation.layout.pp",
    "1",
]
FUSED = ["--intra.fuse_training", "true", "--intra.fuse_inference", "true"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The soup was"}\n{"prompt": "Rain"}\n' * 4)
    return tmp_path


def trained(out: str, *options: str) -> Run:
    assert main(["train", "--config", "run.yaml", "--out", out, *options]) == 0
    (run,) = load_runs(Path(out)).runs
    return run


def same(ours: str, theirs: str) -> None:
    """All files of weights are equal, and so is what training saw."""
    runs = [load_runs(Path(name)).runs[0] for name in (ours, theirs)]
    assert [i.metrics for i in runs[0].iterations] == [i.metrics for i in runs[1].iterations]
    assert [e.metrics for e in runs[0].evaluations] == [e.metrics for e in runs[1].evaluations]
    names = ["last/model.safetensors", "last-critic/model.safetensors"]
    states = Path(ours, "checkpoints/state-3")
    names += [f"state-3/{file.name}" for file in states.glob("*.safetensors")]
    assert len(names) > 2
    for name in names:
        left, right = (Path(run, "checkpoints", name).read_bytes() for run in (ours, theirs))
        assert left == right, name


def test_offloaded_recomputed_and_resumed(folder: Path) -> None:
    trained("plain", "--recompute", "true")
    trained("away", "--recompute", "true", *ALL, "--iterations", "2")
    options = ["--resume", "--recompute", "true", *ALL, "--iterations", "3"]
    run = trained("away", *options)
    same("plain", "away")
    assert {record["iteration"] for record in run.offloads} == {0, 1, 2}
    # From the end of iteration 0 to that of 1: states leave for an evaluation, come for a checkpoint, leave
    # for generation, come for training; weights come for inference, the reward's for the evaluation, too.
    (memory,) = footprint.estimate(resolve(load_config(Path("run.yaml"), ALL)), fused=False)
    states = sum(memory.stages["switch"].values())
    lent = {name: size for name, size in memory.stages["inference"].items() if name.endswith(" weights")}
    assert lent.keys() == {"reference weights", "reward weights"}
    assert memory.host == states + sum(lent.values())
    for record in run.offloads:
        assert 0 < record["seconds"] == record["copy_seconds"]
    expected = 4 * states + sum(lent.values()) + lent["reward weights"]
    assert [r["bytes"] for r in run.offloads if r["iteration"] == 1] == [expected]


def test_offloaded_switched_and_fused(folder: Path) -> None:
    trained("plain", *SWITCHED, *FUSED)
    run = trained("away", *SWITCHED, *FUSED, *ALL)
    same("plain", "away")
    assert len(run.offloads) == len(run.switches) == 3


def test_resumed_with_nothing_offloaded(folder: Path) -> None:
    """Of two replicas, one has no row of the value head to step."""
    trained("plain", "--layout.dp", "2")
    trained("away", "--layout.dp", "2", *ALL, "--iterations", "2")
    here = [option.replace("true", "false") for option in ALL]
    run = trained("away", "--layout.dp", "2", "--resume", *here, "--iterations", "3")
    same("plain", "away")
    assert [record["iteration"] for record in run.offloads] == [0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--offload.reward", "true"], "offload.reward: a reward.function has no weights"),
        (
            ["--offload.reference", "true", "--algorithm.reference_free", "true"],
            "offload.reference: algorithm.reference_free",
        ),
    ],
)
def test_options_without_effect_are_refused(folder: Path, capsys, options: list[str], said: str) -> None:
    text = CONFIG.split("reward:")[0] + 'reward: {function: "puzzle.rlhf.rewards:letter_share"}\ndata:'
    Path("run.yaml").write_text(text + CONFIG.split("\ndata:")[1])
    assert main(["train", "--config", "run.yaml", "--dry-run", *options]) == 2
    assert said in capsys.readouterr().err


def test_chosen_iterations_are_profiled(folder: Path) -> None:
    trained("o", "--profile", "1", "--iterations", "2", "--eval.every", "0", "--checkpoint.save", "false")
    (file,) = Path("o/profiles").iterdir()
    assert file.name == "iteration-1-rank-000.json.gz"
    names = {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "aten::_fused_adamw_"} & names
    records = [json.loads(line) for line in Path("o/run.jsonl").read_text().splitlines()]
    assert [(r["path"], r["iteration"]) for r in records if r["record"] == "trace"] == [
        ("profiles/iteration-1-rank-000.json.gz", 1)
    ]
