"""A campaign in pieces: what starts, what is ended, and what the next piece makes of it."""

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from puzzle.campaign import runs as campaign
from puzzle.campaign.experiments import TABLE, Experiment, Selection, expand, read_table
from puzzle.campaign.forecast import Expectation, run_seconds
from puzzle.cli import main
from puzzle.runlog import load_runs


@pytest.fixture
def experiments() -> list[Experiment]:
    found = expand(read_table(), Selection("cpu", only=("figure9",)))
    return [replace(experiment, lacks=()) for experiment in found[:4]]


def sleeping(seconds: Mapping[str, float]):
    """Commands that sleep so long; -1 fails."""

    def command(experiment: Experiment) -> campaign.Command:
        code = f"import sys, time; s = {seconds[experiment.name]}; s < 0 and sys.exit(3); time.sleep(s)"
        return lambda config, folder: [sys.executable, "-I", "-S", "-c", code]

    return command


def piece(
    experiments: Sequence[Experiment],
    out: Path,
    seconds: Mapping[str, float],
    expected: Mapping[str, float],
    budget: float = 1e3,
) -> dict[str, str]:
    """The outcomes of a piece of a campaign, by name, as recorded."""
    limits = campaign.Budget(budget, time.monotonic(), lambda one, took: expected[one.name])
    console = Console(file=io.StringIO())
    outcomes = campaign.run_all(
        experiments, out, console, sleeping(seconds), None, limits, lambda o: campaign.record(out, {}, o)
    )
    campaign.record(out, {}, outcomes)
    assert {one.experiment.name for one in outcomes} == {one.name for one in experiments}
    return {one.experiment.name: one.status for one in outcomes}


def test_a_piece_starts_no_run_that_would_not_end_in_time(
    tmp_path: Path, experiments: list[Experiment]
) -> None:
    names = [one.name for one in experiments]
    a, b, c, d = names
    quick = dict.fromkeys(names, 0.1) | {b: -1.0}
    first = piece(experiments, tmp_path, quick, {a: 5.0, b: 5.0, c: 9e9, d: 5.0})
    assert first == {a: "done", b: "failed", c: "later", d: "done"}
    text = json.loads((tmp_path / "campaign.json").read_text())
    assert text["complete"] is False
    assert text["runs"][a]["seconds"] > 0
    # What failed comes last; a new piece starts something in any case.
    second = piece(experiments, tmp_path, quick | {b: 0.0}, {b: 9e9, c: 8e9})
    assert second == {a: "kept", b: "later", c: "done", d: "kept"}
    assert campaign.recorded(tmp_path)[a].seconds == text["runs"][a]["seconds"]
    third = piece(experiments, tmp_path, quick | {b: 0.0}, {b: 5.0})
    assert third == {a: "kept", b: "done", c: "kept", d: "kept"}
    assert json.loads((tmp_path / "campaign.json").read_text())["complete"] is True


def test_a_run_that_outlasts_its_piece_is_ended_and_later_given_more_time(
    tmp_path: Path, experiments: list[Experiment]
) -> None:
    one, other = experiments[:2]
    seconds = {one.name: 99.0, other.name: 0.0}
    began = time.monotonic()
    assert piece([one, other], tmp_path, seconds, dict.fromkeys(seconds, 1.0), budget=1.2) == {
        one.name: "later", other.name: "later",
    }  # fmt: skip
    assert time.monotonic() - began < 30
    assert not (tmp_path / "logs" / one.name / "done").exists()
    known = campaign.recorded(tmp_path)
    assert known[one.name].least_seconds > known[one.name].seconds > 1
    assert known[other.name].least_seconds == 0


def test_seconds_are_expected_from_what_ran_before() -> None:
    found = expand(read_table(), Selection("node", only=("figure8",), devices=4, repeats=2))
    by_name = {e.name: e for e in found}
    base, opt, chat = (by_name[f"7b_7b_{v}_64_1-4-1"] for v in ("base", "opt", "dschat"))
    repeat = by_name[f"{base.name}_r1"]
    nothing = Expectation(found, {})
    assert nothing(base) == pytest.approx(1.25 * run_seconds(base.config))
    quick = Expectation(found, {base.name: run_seconds(base.config) / 4})
    assert quick(opt) == pytest.approx(nothing(opt) / 4)
    assert quick(chat) == nothing(chat)
    assert quick(repeat) == pytest.approx(1.1 * run_seconds(base.config) / 4)


@pytest.mark.long
def test_a_campaign_of_toys_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real runs of two processes: a piece too short for one, then the rest, then nothing."""
    table = yaml.safe_load(TABLE.read_text())
    scale = table["scales"]["cpu"]
    scale["fit"], scale["devices"] = True, 2
    table["figures"]["figure9"]["pairs"] = ["7B/350M"]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.chdir(tmp_path)
    words = ["campaign", "--scale", "cpu", "--table", "table.yaml", "--only", "figure9", "--iterations", "3"]
    words += ["--devices", "2", "--cluster", "toys", "--out", "out", "--ship", "ship", "--minutes"]
    assert main([*words, "0.03"]) == 1  # nothing to draw
    assert sorted(run.status for run in campaign.recorded(Path("out")).values()) == ["later", "later"]
    assert main([*words, "9"]) == 0
    logs = {run.variant: run for run in load_runs(Path("ship")).runs}
    assert logs.keys() == {"base", "w_bulk"}
    assert all(len(run.iterations) == 3 and run.cluster == "toys" for run in logs.values())
    before = (Path("out") / "campaign.json").read_text()
    assert main([*words, "9"]) == 0
    assert {run.status for run in campaign.recorded(Path("out")).values()} == {"kept"}
    assert json.loads(before)["complete"] is True
