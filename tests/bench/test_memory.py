"""The memory formula beside the allocations of whole PPO iterations, as `puzzle bench memory` sees them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from puzzle.bench import memory
from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.resolve import resolve
from puzzle.engine.runtime import stage_timer as timing
from puzzle.launch import local
from puzzle.runlog import load_runs

SIZES = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 8, "max_position_embeddings": 256}
RUN = {
    **{f"{role}.init.{key}": value for role in ("actor", "critic", "reward") for key, value in SIZES.items()},
    **{f"{role}.init.preset": "null" for role in ("actor", "critic", "reward")},
    "device": "cpu",
    "batch": 4,
    "data.random_tokens": 88,
    "generation.min_new_tokens": 8,
    "generation.max_new_tokens": 8,
    "algorithm.microbatch": 2,
}


def words(**changes: object) -> list[str]:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return [word for key, value in {**RUN, **named}.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param((1, 1, 1), {"dtype": "fp32"}, marks=pytest.mark.long),
        ((1, 2, 1), {"generation__layout__tp": 2, "generation__layout__pp": 1}),
        ((1, 1, 1), {"offload__optimizer": True, "offload__reference": True, "offload__reward": True}),
        pytest.param(
            (1, 1, 1),
            {"dtype": "bf16", "actor__lora__rank": 8, "critic__lora__targets": "q_proj,down_proj"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_peaks_are_those_of_the_formula(tmp_path: Path, layout: tuple[int, int, int], changes: dict) -> None:
    config = memory.configured(layout, ("7b", "7b"), None, words(**changes))
    local.run("tests.bench.metered:metered", (config, tmp_path / "o"), config.world, tmp_path)
    (run,) = load_runs(tmp_path / "o").runs
    found = memory.peaks(footprint.estimate(resolve(config), fused=False), run)
    stages = 3 + ("generation__layout__tp" in changes)
    assert len(found) == stages * config.world
    assert [peak for peak in found if not peak.ok] == []


def test_a_peak_far_from_the_formula_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = words(**{"batch": 2, "generation.min_new_tokens": 2, "generation.max_new_tokens": 2})
    command = ["bench", "memory", "--models", "7b", "7b", *options, "--out"]
    assert main([*command, str(tmp_path / "uncounted")]) == 0
    monkeypatch.setattr(timing, "take_peak", lambda device: 1 << 30)
    assert main([*command, str(tmp_path / "wrong")]) == 1
    assert capsys.readouterr().out.count("FAIL") == 3
    rows = [json.loads(line) for line in (tmp_path / "wrong/memory.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["generation", "inference", "training"]
    assert all(row["measured_bytes"] == 1 << 30 for row in rows)
    assert all(0 < row["formula_bytes"] < 1 << 28 for row in rows)
    assert main([*command, str(tmp_path / "wrong")]) == 2
    assert "already holds" in capsys.readouterr().err


def test_the_bar_is_a_tenth_of_the_formula() -> None:
    assert memory.Peak(0, "training", 100, 109).ok
    assert not memory.Peak(0, "training", 100, 111).ok
    assert not memory.Peak(0, "training", 100, 89).ok
    assert not memory.Peak(0, "training", 100, None).ok
    assert math.isnan(memory.Peak(0, "training", 100, None).ratio)
