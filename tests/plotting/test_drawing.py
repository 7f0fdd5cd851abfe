"""The command draws what logs hold, says what they lack, and gives equal bytes for equal logs."""

import os
import subprocess
import sys

from tests.plotting.builders import ROOT, figure8, read, write
from tests.plotting.commands import draw, raw, refused
from tests.runlog import texts


def test_a_missing_variant_is_a_gap(tmp_path, capsys):
    logs = figure8(tmp_path / "logs", variants=("dschat", "opt"))
    assert draw("--logs", logs, "--out", tmp_path / "out") == 0
    row = read(tmp_path / "out/figure8.csv")["local (rehearsal)", "7B/350M", "PUZZLE-Base"]
    assert (row["value"], row["n"], row["spread"], row["source"]) == ("", "0", "", "")
    out = capsys.readouterr().out
    assert "missing: figure8 local (rehearsal) 7B/350M PUZZLE-Base: no log" in out
    assert "missing: figure9, figure10, figure11, figure12, table3: no log\n" in out
    assert out.splitlines()[0] == "figure8   end to end, times as fast as DS-Chat: local (rehearsal) 1.33"


def test_names_of_any_bytes_are_written(tmp_path, capsys):
    """A folder's name makes the cluster; the reader of the table may know no more than ASCII."""
    tree = raw(tmp_path / "logs", texts.as_bytes(texts.puzzle_lines()))
    os.rename(os.fsencode(tree / "figure8/orion"), os.fsencode(tree / "figure8") + b"/a\xff\n$b")
    assert draw("--logs", tree, "--out", tmp_path / "out") == 0
    assert "a\\udcff $b" in (tmp_path / "out/figure8.csv").read_text()
    capsys.readouterr().out.encode()


def test_what_the_reader_noted_is_said_once(tmp_path):
    lines = [line.replace("stage 2(infer.)", "stage 12infer.)") for line in texts.puzzle_lines()]
    tree = raw(tmp_path / "logs", texts.as_bytes(lines))
    assert draw("--logs", tree, "--out", tmp_path / "out") == 0
    report = (tmp_path / "out/report.md").read_text()
    assert report.count("iteration 1: other text inside its line") == 1


def test_several_trees_are_drawn_together(tmp_path):
    for repeat in range(3):
        figure8(tmp_path / f"try{repeat}", repeat=repeat)
    trees = [argument for repeat in range(3) for argument in ("--logs", tmp_path / f"try{repeat}")]
    assert draw(*trees, "--logs", tmp_path / "try0", "--out", tmp_path / "out") == 0
    report = (tmp_path / "out/report.md").read_text()
    assert report.count("- try0/opt/run.jsonl: the same run as try0/opt/run.jsonl; counted once") == 1
    row = read(tmp_path / "out/figure8.csv")["local (rehearsal)", "7B/350M", "PUZZLE"]
    assert (float(row["value"]), row["n"], float(row["spread"])) == (2.0, "3", 0.0)
    assert row["source"] == "; ".join(f"try{i}/dschat/run.jsonl" for i in range(3)) + " over " + "; ".join(
        f"try{i}/opt/run.jsonl" for i in range(3)
    )


def test_trees_that_disagree_are_refused(tmp_path, capsys):
    figure8(tmp_path / "a")
    write(tmp_path / "b", "opt", seconds=(9.0, 1.0))
    assert draw("--logs", tmp_path / "a", "--logs", tmp_path / "b", "--out", tmp_path / "out") == 2
    refused(capsys, "are both repeat 0 of opt and disagree")
    assert not (tmp_path / "out").exists()


def test_equal_logs_give_equal_bytes_from_any_folder(tmp_path, monkeypatch):
    """Also where they are named from another folder, and with remarks and damage that name logs."""
    drawn = []
    for place, named in (("here", "logs"), ("far/away from here", "."), ("third", None)):
        logs = tmp_path / place / "logs"
        figure8(logs)
        damaged = logs / "base/run.jsonl"
        lines = damaged.read_text().splitlines()
        lines[2] = lines[2].replace('"e2e_seconds":6.0', '"e2e_seconds":NaN')
        damaged.write_text("\n".join(lines) + "\n")
        monkeypatch.chdir(logs if named == "." else logs.parent)
        out = tmp_path / f"out {place.replace('/', ' ')}"
        assert draw("--logs", named or logs, "--out", out) == 0
        drawn.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert drawn[0].keys() == drawn[1].keys() > {"figure8.pdf", "figure8.png", "report.md"}
    assert b"base/run.jsonl" in drawn[0]["report.md"]
    assert drawn[0] == drawn[1] == drawn[2]
    assert not [name for name, data in drawn[0].items() if bytes(tmp_path) in data]


def test_the_results_are_not_buried(tmp_path, capsys):
    """First what each figure says; then where all is, and that it is what was published."""
    assert draw("--out", tmp_path / "out", "--only", "figure9", "table3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "figure9  training, times as fast as without time-sharing: orion 1.06-1.12, phoenix 1.04-1.13",
        "table3   seconds of one context switch: orion PUZZLE 0.08-0.30, DS-Chat 1.67-7.11; phoenix PUZZLE "
        "0.07-0.33,",
        "         DS-Chat 0.96-2.91",
        f"pictures (PDF, PNG) and numbers (CSV): {tmp_path / 'out'}",
        f"report, with 4 notes on numbers and 20 on logs: {tmp_path / 'out/report.md'}",
        "36 of 36 numbers as published",
    ]


def test_many_lines_of_a_kind_are_counted(tmp_path, capsys):
    for pair in range(9):
        for variant in ("dschat", "opt"):
            name = f"{pair}-{variant}"
            write(tmp_path / "logs" / name, variant, run_id=name, actor=f"{pair}B")
    assert draw("--logs", tmp_path / "logs", "--out", tmp_path / "out", "--only", "figure8") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "missing" in line or "more" in line]
    assert len(lines) == 6
    assert lines[-1] == "... and 4 more of these, in report.md"
    assert (tmp_path / "out/report.md").read_text().count("PUZZLE-Base: no log") == 9


def test_only_what_is_wanted(tmp_path):
    assert draw("--only", "table3", "--only", "figure12", "--out", tmp_path / "out") == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"table3", "figure12", "report"}


def test_constants_of_figure10_come_with_raw_logs(tmp_path):
    name = "llama_7b_7b_128_8_1_2_{}_bulk_2024-05-05T16:00:37+0800.log"
    for variant in ("w", "wo"):
        path = tmp_path / "logs/figure10" / name.format(variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts.as_bytes(texts.puzzle_lines()))
    assert draw("--logs", tmp_path / "logs", "--out", tmp_path / "out") == 0
    rows = read(tmp_path / "out/figure10.csv")
    assert float(rows["orion", "7B/7B bs128 (8,1,2)", "Theoretical"]["value"]) == 1.1483
    assert len(rows) == 2
    report = (tmp_path / "out/report.md").read_text()
    assert "- logs/published: 1 theoretical values of figure 10 come from there" in report


def test_no_torch_and_no_traceback(tmp_path):
    """The command runs where nothing but the plotting tier is installed."""
    blocked = "import sys; sys.modules.update(torch=None, pydantic=None, transformers=None, scipy=None)\n"
    code = f"{blocked}from plotting.__main__ import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "--out", str(tmp_path / "out"), "--only", "figure9"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
