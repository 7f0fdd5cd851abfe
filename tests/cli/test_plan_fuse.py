"""`puzzle plan fuse` from a table of costs and from the trace of a run; its errors in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.plan.simulate.simulate import simulate
from puzzle.plan.simulate.timeline import Span, Timeline
from tests.plan.costs import uniform
from tests.plan.single import one_f_one_b

SHARED = {"activation": 0.0, "gradient": 0.0, "reduce": 0.25, "norm": 0.0, "step": 0.5, "gather": 0.25}
COSTS = {
    "actor": {"forward": 1.0, "backward": [2.0, 2.0, 2.0, 2.0], **SHARED},
    "critic": {"forward": 0.25, "backward": 0.5, **SHARED},
}


@pytest.fixture
def costs(tmp_path: Path) -> str:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(COSTS))
    return str(file)


def test_training(costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "fuse", "--pp", "4", "--training", "actor=8", "critic=8", "--costs", costs]
    assert main([*given, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    apart = next(r for r in rows if r["candidate"] == "apart")
    # By hand: 11 slots of 3 s and of 0.75 s, and twice an optimizer of 1 s with nothing to overlap.
    assert (apart["seconds"], apart["flushes"], apart["saved_share"]) == (33 + 8.25 + 2, 2, 0)
    assert rows[0]["saved_share"] == pytest.approx(1 - rows[0]["seconds"] / apart["seconds"])
    assert sorted(rows[0]["orders"][0]) == ["actor"] * 8 + ["critic"] * 8

    out = tmp_path / "drawn"
    assert main([*given, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"chosen: {rows[0]['candidate']}" in text
    assert len([line for line in text.splitlines() if "%" in line]) == len(rows) == 6
    best = Timeline.from_perfetto(json.loads((out / "fuse.json").read_text()))
    assert best.makespan == pytest.approx(rows[0]["seconds"])
    assert (out / "fuse.png").stat().st_size > 10_000
    assert (out / "fuse.pdf").is_file()


def test_inference(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "fuse", "--pp", "4", "--inference", "actor=8", "critic=4", "--costs", costs, "--json"]
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["seconds"], r["flushes"]) for r in rows] == [(12.0, 1), (12.0, 1), (12.75, 2)]


def test_costs_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on 4 ranks, two per stage, that trained the models one after the other."""
    cost = uniform(["actor", "critic"], 1.0, 2.0)
    parts = [simulate(one_f_one_b(2, 4, name, optimizer=True), cost) for name in ("actor", "critic")]
    whole = Timeline.after_one_another(parts)
    ranks = tuple(replace(s, row=2 * s.row + t) for s in whole.spans for t in range(2))
    (tmp_path / "trace.json").write_text(json.dumps(Timeline(ranks, "measured").to_perfetto()))
    given = ["plan", "fuse", "--pp", "2", "--training", "actor=4", "critic=4"]
    assert main([*given, "--trace", str(tmp_path / "trace.json"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["seconds"] == pytest.approx((4 + 4 + 1) * 3)
    assert rows[-1]["seconds"] == pytest.approx(2 * (4 + 1) * 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required"),
        (["--pp", "0", "--training", "actor=2", "--costs", "COSTS"], "from 1 to 1024"),
        (["--pp", "4", "--training", "actor", "--costs", "COSTS"], "write MODEL=N"),
        (["--pp", "4", "--training", "actor=0", "--costs", "COSTS"], "write MODEL=N"),
        (
            ["--pp", "4", "--training", "reward=2", "critic=1", "--costs", "COSTS"],
            "no cost of reward: forward, activation, backward, reduce, norm, step, gather, gradient; measure",
        ),
        (
            ["--pp", "5", "--inference", "reward=2", "value=1", "--costs", "COSTS"],
            "no cost of reward: forward, activation; value: forward, activation; measure",
        ),
        (
            ["--pp", "5", "--training", "actor=2", "critic=1", "--costs", "COSTS"],
            "actor: backward on stage 4;",
        ),
        (["--pp", "4", "--training", "actor=2", "--trace", "COSTS"], "traceEvents is missing"),
        (["--pp", "4", "--training", "actor=2", "--costs", "missing.json"], "No such file"),
    ],
)
def test_bad_input(arguments: list[str], words: str, costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [costs if word == "COSTS" else word for word in arguments]
    assert main(["plan", "fuse", *given]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "table",
    [
        [],
        "text",
        {"actor": 3},
        {"actor": {"forward": "1", "activation": 0}},
        {"actor": {"forward": True, "activation": 0}},
        {"actor": {"forward": -1, "activation": 0}},
        {"actor": {"forward": None, "activation": 0}},
        {"actor": {"forward": float("nan"), "activation": 0}},
        {"actor": {"forward": 10**399, "activation": 0}},
        {"actor": {"forward": [1, 2, 3], "activation": 0}},
        {"actor": {"forward": [1, "2"], "activation": 0}},
        {"actor": {"forward": {"a": 1}, "activation": 0}},
    ],
    ids=str,
)
def test_tables_that_hold_no_seconds(table: object, tmp_path: Path, capsys) -> None:
    (tmp_path / "costs.json").write_text(json.dumps(table))
    words = ["--pp", "2", "--inference", "actor=2", "--costs", str(tmp_path / "costs.json")]
    assert main(["plan", "fuse", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/costs.json: ")
    assert said.count("\n") == 1


TRACE = Timeline((Span(0, "compute", "forward", 0.0, 1.0, "forward", "actor", 0),)).to_perfetto()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pid", "0"),
        ("tid", 99),
        ("ts", None),
        ("ts", "1"),
        ("ts", 1e308),
        ("dur", -1),
        ("dur", float("inf")),
        ("dur", 1e308),
        ("cat", 3),
        ("args", None),
        ("args", {"model": 3}),
        ("args", {"model": "actor", "microbatch": 0.5}),
        ("ph", 1),
    ],
)
def test_traces_that_hold_no_spans(key: str, value: object, tmp_path: Path, capsys) -> None:
    events = [event | ({key: value} if event["ph"] == "X" else {}) for event in TRACE["traceEvents"]]
    (tmp_path / "trace.json").write_text(json.dumps(TRACE | {"traceEvents": events}))
    words = ["--pp", "1", "--inference", "actor=2", "--trace", str(tmp_path / "trace.json")]
    assert main(["plan", "fuse", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/trace.json: traceEvents[")
    assert said.count("\n") == 1
