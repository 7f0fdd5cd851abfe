"""`puzzle bench overlap` on two gloo processes: every way fills the same weights, and sums add up."""

import json
from pathlib import Path

import pytest

from puzzle.cli import main
from tests.bench.test_switch import TINY


def test_ways_and_what_they_save(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    given = ["bench", "overlap", "--pairs", "1,1,2:2,1,1", "1,2,1:2,1,1", "--model", str(tmp_path)]
    sizes = ["--rows", "3", "--length", "8", "--device", "cpu", "--dtype", "fp32", "--repeats", "1"]
    assert main([*given, *sizes, "--out", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    ways = [("messages", "gathered"), ("messages", "shards"), ("peer", "gathered"), ("peer", "shards")]
    assert [(row["transport"], row["filled_from"]) for row in rows] == [*ways, *ways[::2]]
    for row in rows:
        assert (row["gather_seconds"] > 0) == (row["filled_from"] == "gathered" and row["from"] == [1, 1, 2])
        times = {name: row[f"{name}_seconds"] for name in ("fill", "pass", "in_turn", "beside")}
        assert min(times.values()) > 0
        assert row["saved_beside_seconds"] == pytest.approx(times["in_turn"] - times["beside"])
    for before, after in zip(rows[:4:2], rows[1:4:2], strict=True):
        saved = before["gather_seconds"] + before["in_turn_seconds"] - after["in_turn_seconds"]
        assert after["saved_by_fill_seconds"] == pytest.approx(saved)
        # Norms alone have to come: a rank has stepped the rows that it generates with.
        assert (before["bytes"], after["bytes"]) == (0, 5 * 32 * 4)


def test_errors_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overlap", "--device", "cpu", "--pairs", "1,2,1:4,1,1"]) == 2
    error = capsys.readouterr().err
    assert "layouts of [2, 4] processes; give layouts of one size" in error
    assert error.count("\n") == 1
