"""Every published number, through the command line, from shipped logs and from logs in published formats."""

import csv
import shutil

import pytest

from puzzle.plotting.__main__ import main
from puzzle.plotting.rows import COLUMNS
from tests.plotting.builders import PUBLISHED, TABLE, raw_tree, read

FIGURES = ("figure8", "figure9", "figure10", "figure11", "figure12", "table3")
RATIOS = FIGURES[:4]


@pytest.fixture(scope="module", params=["shipped", "raw"])
def drawn(request, tmp_path_factory):
    logs = PUBLISHED
    if request.param == "raw":
        logs = raw_tree(tmp_path_factory.mktemp("raw"))
        # The artifact has this log under two names; the table has no row for the second.
        (first,) = (logs / "table3/orion").glob("llama_7b_7b_opt_*")
        shutil.copy(first, first.with_name(first.name.replace("7b_7b", "7b_350m")))
    out = tmp_path_factory.mktemp("drawn") / "figures"
    assert main(["--logs", str(logs), "--out", str(out)]) == 0
    return out


def test_every_number(drawn):
    files = {path.stem: read(path) for path in drawn.glob("*.csv")}
    wrong = []
    for figure, cluster, config, series, value, unit in TABLE:
        file = f"{figure}_seconds" if figure in RATIOS and unit == "s" else figure
        name, _, spread = series.partition(" spread")
        name, field = (name, "value") if name == series else (name, "spread")
        row = files[file][cluster, config, name]
        assert row["unit"] == unit
        assert spread == ""
        if float(row[field]) != pytest.approx(value, abs=1e-9, rel=0):
            wrong.append((figure, cluster, config, series, row[field], value))
    assert not wrong


def test_nothing_but_the_published_rows(drawn):
    for figure in FIGURES:
        unit = "1" if figure in RATIOS else "s"
        expected = {tuple(row[1:4]) for row in TABLE if row[0] == figure and row[5] == unit}
        expected = {row for row in expected if not row[2].endswith(" spread")}
        assert set(read(drawn / f"{figure}.csv")) == expected


def test_columns_counts_and_sources(drawn):
    with (drawn / "figure8.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    row = read(drawn / "figure8.csv")["phoenix", "7B/7B", "PUZZLE"]
    assert row["n"] == "11"
    base, own = row["source"].split(" over ")
    assert base.endswith("llama_7b_7b_dschat_2024-04-28T09:51:47+08:00.log")
    assert own.endswith("llama_7b_7b_opt_2024-04-27T16:26:17+08:00.log")


def test_every_file_is_there(drawn):
    names = {f"{figure}.{kind}" for figure in FIGURES for kind in ("pdf", "png", "csv")}
    assert names | {"report.txt"} | {f"{figure}_seconds.csv" for figure in RATIOS} == {
        path.name for path in drawn.iterdir()
    }
    assert list(drawn.parent.iterdir()) == [drawn]


def test_irregularities_are_named(drawn):
    report = (drawn / "report.txt").read_text()
    assert "figure8 orion 33B/7B PUZZLE: the arguments of this log have re-sharding off" in report
    assert "table3 orion 13B/350M PUZZLE: the logs of this run differ" in report
    assert "table3 orion 33B/7B PUZZLE: the logs of this run differ" in report
    assert "table3 orion 7B/7B PUZZLE: this log and its baseline's are of different jobs" in report
    assert "figure8 orion 7B/7B DS-Chat: baselines of this job differ" in report
    assert "missing" not in report
