"""Every published number, through the command line, from shipped logs and from logs in published formats."""

import csv
import shutil
from dataclasses import replace

import pytest

from puzzle.plotting import published
from puzzle.plotting.__main__ import main
from puzzle.plotting.rows import COLUMNS, Row
from tests.plotting.builders import PUBLISHED, TABLE, raw_tree, read
from tests.runlog import texts

FIGURES = ("figure8", "figure9", "figure10", "figure11", "figure12", "table3")
RATIOS = FIGURES[:4]


@pytest.fixture(scope="module", params=["shipped", pytest.param("raw", marks=pytest.mark.long)])
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
    assert names | {"report.md"} | {f"{figure}_seconds.csv" for figure in RATIOS} == {
        path.name for path in drawn.iterdir()
    }
    assert list(drawn.parent.iterdir()) == [drawn]


def test_irregularities_are_named(drawn):
    report = (drawn / "report.md").read_text()
    assert "orion 33B/7B PUZZLE: the arguments of this log have re-sharding off" in report
    assert "orion 13B/350M PUZZLE: the logs of this run differ" in report
    assert "orion 33B/7B PUZZLE: the logs of this run differ" in report
    assert "orion 7B/7B PUZZLE: this log and its baseline's are of different jobs" in report
    assert "orion 7B/7B DS-Chat: baselines of this job differ" in report
    assert "Missing" not in report
    assert "**186 of 186 numbers as published.**" in report


NUMBERS = published.read(PUBLISHED / "figures.csv")


def rows_as_published():
    """Of figure 9 and table 3."""
    found = {}
    for one in NUMBERS:
        if one.figure in ("figure9", "table3"):
            row = Row(
                one.cluster, one.config, one.series, one.value, one.unit, 5, None, ("log",), "published"
            )
            found.setdefault(one.figure, []).append(row)
    return found


def test_the_comparison_counts_what_was_computed_again():
    assert len(NUMBERS) == len(TABLE) == 186
    found = rows_as_published()
    assert published.compare(found, NUMBERS) == published.Comparison(36, 36)
    first = found["table3"][0]
    last = found["figure9"][-1]
    found["table3"][0] = replace(first, value=first.value + 1e-6)
    found["figure9"][-1] = replace(last, value=None)
    wrong = published.compare(found, NUMBERS)
    assert wrong is not None
    assert (wrong.same, wrong.numbers) == (34, 36)
    assert wrong.differing == (
        f"figure9 {last.cluster} {last.config} {last.series}: no value, published {last.value:.6g} s",
        "table3 orion 7B/7B PUZZLE: 0.0847147, published 0.0847137 s",
    )
    found["figure9"].pop()
    assert published.compare(found, NUMBERS) == wrong
    beside = [replace(row, cluster=f"{row.cluster} (published)") for row in found["table3"]]
    assert published.compare({"table3": beside}, NUMBERS) == published.Comparison(11, 12, wrong.differing[1:])


def test_what_is_not_published_is_not_compared():
    measured = {
        name: [replace(row, provenance="measured") for row in rows]
        for name, rows in rows_as_published().items()
    }
    assert published.compare(measured, NUMBERS) is None


def test_the_last_line_is_what_was_compared(tmp_path, capsys):
    """A figure of whole logs; one of a log that says another time; the corrected reading."""
    only = ["--only", "table3", "--out", str(tmp_path / "out")]
    assert main(only) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "12 of 12 numbers as published"
    tree = raw_tree(tmp_path / "raw")
    (log,) = (tree / "table3/phoenix").glob("llama_33b_7b_opt_*")
    lines = log.read_text().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if line.startswith(texts.reshard_line(0)[:9]))
    log.write_text("".join(lines[:last] + lines[last + 1 :]))
    assert main(["--logs", str(tree), *only]) == 0
    *_, wrong, _, _, last = capsys.readouterr().out.splitlines()
    assert wrong.startswith("not as published: table3 phoenix 33B/7B PUZZLE: ")
    assert wrong.endswith(", published 0.333118 s")
    assert last == "11 of 12 numbers as published"
    assert main(["--reading", "corrected", *only]) == 0
    out = capsys.readouterr().out
    assert "not as published" not in out
    assert out.endswith("\n9 of 12 numbers as published; the corrected reading gives others for the rest\n")
