"""Calibrating, predicting and comparing with a run, on a CPU with two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from puzzle.bench import beside
from puzzle.bench.pieces import Found, PiecesBench
from puzzle.cli import main
from puzzle.engine.runtime.world import World
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.tables import Tables
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import published
from tests.reference.tiny import save_lm

CONFIG = """\
actor: {{model: {model}}}
reward: {{init: {{num_hidden_layers: 4, hidden_size: 64, intermediate_size: 96, num_attention_heads: 8,
  num_key_value_heads: 2, vocab_size: 259}}}}
layout: {{tp: 1, pp: 2}}
batch: 8
iterations: 1
device: cpu
data: {{random_tokens: 8}}
generation: {{max_new_tokens: 8, layout: {{tp: 2, pp: 1}}}}
algorithm: {{microbatch: 2}}
checkpoint: {{save: false}}
"""
SCRIPT = Path(__file__).parents[2] / "scripts" / "layouts_visit.sh"
SIZES = ["--tokens", "16", "--length", "16", "--rows", "2", "--prompts", "8", "--bytes", "1024"]


def test_a_calibration_predicts_what_then_runs(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Whatever else the machine does: no second is compared, but for what adds up."""
    model, made, config = tmp_path / "lm", tmp_path / "made.json", tmp_path / "run.yaml"
    save_lm(model, "llama")
    wide = save_lm(tmp_path / "wide", "llama", intermediate_size=192)
    given = ["--world", "2", "--device", "cpu", "--dtype", "fp32", "--repeats", "1"]
    given += ["--models", str(model), str(wide), *SIZES, "--engine", "here"]
    assert main(["bench", "calibrate", *given, "--out", str(made)]) == 0
    found = read_calibration(str(made))
    tables = found.costs
    assert isinstance(tables, Tables)
    assert (found.engine, found.device, found.tensor_parallel) == ("here", "cpu", True)
    assert {row.tp for row in tables.layers} == {row.tp for row in tables.decodes} == {1, 2}
    assert {row.op for row in tables.collectives} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert {(row.tokens, row.length) for row in tables.layers} == {(16, 16)}
    for table in (tables.layers, tables.decodes):
        assert len({row.shape for row in table}) == 2, "every model has layers and decode passes"
    assert [row.dp for row in tables.steps] == [2]
    assert tables.step_s_per_parameter > 0
    assert tables.fixed.step_s >= 0
    capfd.readouterr()

    config.write_text(CONFIG.format(model=model))
    assert main(["plan", "predict", "--config", str(config), "--calibration", str(made), "--json"]) == 0
    predicted = json.loads(capfd.readouterr().out)
    assert all(seconds > 0 for seconds in predicted["stages"].values())
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    capfd.readouterr()
    compare = ["plan", "compare", str(tmp_path / "out"), "--calibration", str(made), "--json"]
    assert main(compare) == 0
    (row,) = json.loads(capfd.readouterr().out)["runs"][str(made)]
    for stage, seconds in predicted["stages"].items():
        assert row["predicted"][stage] == pytest.approx(seconds)
        assert row["measured"][stage] > 0
    assert row["predicted"]["end to end"] == pytest.approx(predicted["end_to_end"])
    assert row["run"] == "out"


def test_a_step_has_seconds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What parameters take and what they do not; where times are disturbed, no less than 0."""

    def told(own: float, *names: str) -> tuple[float, float, list[int]]:
        layers = []

        def stepped(bench: object, world: object, spec: ModelSpec, *_: object) -> tuple[float, float]:
            layers.append(spec.num_layers)
            return own + 3e-9 * spec.parameters, float(spec.parameters)

        monkeypatch.setattr(beside, "_stepped", stepped)
        found, cuts = Found(), [replace(published(name), num_layers=2) for name in names]
        bench, world = cast("PiecesBench", None), cast("World", None)
        left = beside._steps(bench, world, found, cuts, (1, 1, 1), 16)
        return found.step, left, layers

    assert told(0.25, "7b", "350m") == (pytest.approx(3e-9), pytest.approx(0.25), [2, 2])
    assert told(0.25, "350m", "7b") == (pytest.approx(3e-9), pytest.approx(0.25), [1, 2])
    assert told(-0.9, "350m") == (pytest.approx(3e-9), 0.0, [1, 2])


def test_a_visit_is_predicted_before_it_is_made(tmp_path: Path) -> None:
    """The script's toy; its runs are made by hand."""
    out, env = tmp_path / "said.jsonl", {**os.environ, "TINY": "1", "PYTHON": sys.executable}
    subprocess.run(["bash", SCRIPT, "predict", "h200", out], env=env, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["run"] for row in rows} == {"1-2-1_2-1-1_fused", "1-2-1_1-2-1_apart"}
    assert rows[0]["end_to_end"] <= rows[1]["end_to_end"]
    assert all(row["end_to_end"] == pytest.approx(sum(row["stages"].values())) for row in rows)
    assert all(row["calibration"] == "h200" for row in rows)
    assert subprocess.run(["bash", SCRIPT, "guess"], capture_output=True, check=False).returncode == 2
