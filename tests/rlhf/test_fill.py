"""PPO that generates out of ZeRO shards, before they are gathered: bit for bit the run without."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from tests.rlhf.test_offload import CONFIG, same, trained

GENERATION = ("--generation.layout.dp", "1", "--generation.layout.tp", "2")
ROWS = ("--actor.init.vocab_size", "259", "--reward.init.vocab_size", "259")  # replicas step unlike numbers
SHARDS = ("--switch.source", "zero_shards", "--switch.verify", "true")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Evaluations and checkpoints come between some iterations; other iterations follow one another."""
    monkeypatch.chdir(tmp_path)
    text = CONFIG.replace("eval: {every: 1}", "eval: {every: 2}")
    (tmp_path / "run.yaml").write_text(text.replace("checkpoint: {every: 1}", "checkpoint: {every: 3}"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The soup was"}\n{"prompt": "Rain"}\n' * 4)
    return tmp_path


def test_bitwise_the_gathered_run(folder: Path) -> None:
    layouts = ["--layout.dp", "2", *GENERATION, *ROWS, "--offload.optimizer", "true"]
    gathered = trained("gathered", *layouts)
    shards = trained(
        "shards", *layouts, *SHARDS, "--intra.fuse_training", "true", "--switch.transport", "peer"
    )
    same("gathered", "shards")
    for before, after in zip(gathered.switches, shards.switches, strict=True):
        was, now = before.fields, after.fields
        assert (was["filled_from"], now["filled_from"]) == ("gathered", "shards")
        assert now["bytes"] == now["lower_bound_bytes"]
        assert now["gather_bytes"] == was["gather_bytes"]
        assert was["saved_bytes"] == 0
        assert now["saved_bytes"] == was["gather_bytes"] + was["bytes"] - now["bytes"] > 0
        parts = [now[f"{name}_seconds"] for name in ("fill", "drop", "gather")]
        assert after.seconds == pytest.approx(sum(parts))


@pytest.mark.long
@pytest.mark.parametrize(
    "layouts",
    [
        ["--layout.dp", "3", "--generation.layout.dp", "1", "--generation.layout.pp", "3"],
        ["--layout.dp", "2", "--layout.pp", "2", *GENERATION, "--generation.layout.pp", "2"],
        [
            "--layout.dp",
            "2",
            "--layout.tp",
            "2",
            "--generation.layout.dp",
            "4",
            "--generation.layout.tp",
            "1",
        ],
    ],
)
def test_more_layouts(folder: Path, layouts: list[str]) -> None:
    tied = ("--actor.init.tie_word_embeddings", "true", "--algorithm.minibatch", "4")
    trained("gathered", *layouts, *ROWS, *tied)
    trained("shards", *layouts, *ROWS, *tied, *SHARDS)
    same("gathered", "shards")


def test_memory_counts_rows_on_their_way(folder: Path) -> None:
    """While it generates, a rank gathers both replicas' rows, beside the weights that they are for."""
    given = ["--layout.dp", "2", *GENERATION]
    gathered, shards = (
        footprint.estimate(
            resolve(load_config(Path("run.yaml"), [*given, "--switch.source", fill])), fused=False
        )
        for fill in ("gathered", "zero_shards")
    )
    for before, after in zip(gathered, shards, strict=True):
        more = after.total("generation") - before.total("generation")
        assert more == before.resident["actor weights"]


def test_the_option_is_one_of_two(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "run.yaml", "--dry-run", "--switch.source", "some"]) == 2
    assert "switch.source" in capsys.readouterr().err
