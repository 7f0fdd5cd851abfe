"""The same campaign under every launcher: each figure with each of its variants, and the same losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle.campaign.experiments import TABLE, Selection, expand, read_table
from puzzle.launch import LAUNCHERS, Launcher
from tests.launch.running import ROOT, cleared, environment, metrics

PAIR = "7B/7B"


def shortened(folder: Path) -> Path:
    """The table of experiments with one pair of models and one layout and batch for each figure."""
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text())
    for figure in table["figures"].values():
        if "pairs" in figure:
            assert PAIR in figure["pairs"]
            figure["pairs"] = [PAIR]
    table["scales"] = {"cpu": table["scales"]["cpu"]}
    table["scales"]["cpu"]["grid"] = {PAIR: {"batches": [8], "layouts": [[2, 2, 1]]}}
    file = folder / "experiments.yaml"
    file.write_text(yaml.safe_dump(table))
    return file


def run_campaign(folder: Path, launcher: Launcher, table: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of all iterations of all runs, by the run's folder."""
    out = folder / launcher
    words = ["--scale", "cpu", "--launcher", launcher, "--iterations", "2"]
    ended = subprocess.run(
        [ROOT / "RUNME-b.sh", *words, "--table", str(table), "--out", str(out)],
        cwd=folder,
        env=environment(PUZZLE_TEST=str(folder), PUZZLE_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return {run.name: metrics(run) for run in sorted((out / "logs").iterdir())}


@pytest.mark.long
@pytest.mark.slurm
def test_a_campaign_has_the_same_losses_under_all_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm.yaml").write_text('time: "01:00:00"\nnodelist: "node[1-4]"\n')
    monkeypatch.setenv("PUZZLE_SLURM", str(tmp_path / "slurm.yaml"))
    table = shortened(tmp_path)
    whole, short = (expand(read_table(file), Selection("cpu")) for file in (TABLE, table))
    covered = {(figure, e.config.log.variant) for e in whole for figure in e.config.log.figures}
    assert {(figure, e.config.log.variant) for e in short for figure in e.config.log.figures} == covered
    with cleared(tmp_path):
        found = {launcher: run_campaign(tmp_path, launcher, table) for launcher in LAUNCHERS}
    assert len(found["local"]) == len(short)
    assert all(len(run) == 2 for run in found["local"].values())
    assert found["ray"] == found["local"]
    assert found["slurm"] == found["local"]
