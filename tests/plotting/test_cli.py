"""The command: every bad input is one clear line and exit code 2, and nothing is half-written."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from puzzle.plotting.__main__ import main
from tests.plotting.builders import ROOT, figure8, read, write
from tests.runlog import texts


def draw(*arguments):
    return main([str(argument) for argument in arguments])


def command(*arguments, **options):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "puzzle.plotting", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options)


def refused(capsys, *words):
    """The one line on stderr; nothing was printed besides."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return err


@pytest.fixture
def logs(tmp_path):
    return figure8(tmp_path / "logs")


@pytest.fixture
def here(tmp_path):
    """What lies in the folder of a test, with the content of files; unchanged after a refused command."""
    return lambda: {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}


def a_file(folder, data=b"text"):
    folder.mkdir(exist_ok=True)
    path = folder / "file"
    path.write_bytes(data)
    return path


def header_only(folder):
    with_run = write(folder / "opt")
    lines = (with_run / "run.jsonl").read_text().splitlines()
    (with_run / "run.jsonl").write_text(lines[0] + "\n")
    return folder


def raw(folder, data):
    path = folder / "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return folder


def two_of_one_run(folder):
    figure8(folder / "a")
    write(folder / "b", "opt", seconds=(9.0, 1.0))
    return folder


def one_repeat_of_another_job(folder):
    figure8(folder / "a")
    write(folder / "b", "opt", repeat=1, config={"iterations": 8, "global_batch_size": 99})
    return folder


def other_header(folder):
    figure8(folder)
    path = folder / "opt/run.jsonl"
    lines = path.read_text().splitlines()
    second = json.loads(lines[0])
    second["cluster"], second["seq"] = "elsewhere", 90
    del second["crc"]
    path.write_text("\n".join([*lines, json.dumps(second)]) + "\n")
    return folder


def empty_log(folder):
    folder.mkdir()
    (folder / "run.jsonl").touch()
    return folder


def junk(folder):
    (empty_log(folder) / "run.jsonl").write_bytes(b"\xff\x00\n" * 9)
    return folder


def nan_values(folder):
    figure8(folder, variants=("opt",))
    path = folder / "opt/run.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"iteration"' in line or '"run"' in line]
    lines[1:] = [
        line.partition(',"crc"')[0].replace("9.0", "NaN").replace("4.0", "NaN") + "}" for line in lines[1:]
    ]
    path.write_text("\n".join(lines))
    return folder


BAD_LOGS = {
    "missing folder": (lambda folder: folder / "none", ["none", "no such folder"]),
    "a file": (lambda folder: a_file(folder), ["is a file"]),
    "an empty folder": (lambda folder: (folder.mkdir(), folder)[1], ["no readable run"]),
    "an empty log": (empty_log, ["run.jsonl", "empty log"]),
    "an empty raw log": (lambda folder: raw(folder, b""), ["no readable iteration"]),
    "binary junk": (lambda folder: raw(folder, bytes(range(256)) * 99), ["no readable run"]),
    "binary junk as run.jsonl": (junk, ["run.jsonl", "no readable run"]),
    "a text that is no log": (lambda folder: raw(folder, b"hello\n"), ["no readable"]),
    "a log with nothing but its header": (header_only, ["no numbers"]),
    "a raw log cut off after its warm-up": (
        lambda folder: raw(folder, texts.as_bytes(texts.puzzle_lines())[:2500]),
        ["no numbers"],
    ),
    "nothing but NaN": (nan_values, ["no numbers"]),
    "runs of no figure": (lambda folder: figure8(folder, figures=()), ["no numbers"]),
    "runs of an unknown variant": (lambda folder: figure8(folder, variants=("mine",)), ["no numbers"]),
    "two logs of one repeat": (two_of_one_run, ["repeat 0", "remove one"]),
    "repeats of different jobs": (one_repeat_of_another_job, ["global batch 16 and 99"]),
    "two headers in one log": (other_header, ["two runs that disagree"]),
}


@pytest.mark.parametrize("case", BAD_LOGS)
def test_bad_logs(case, tmp_path, capsys, here):
    make, words = BAD_LOGS[case]
    folder = make(tmp_path / "given")
    before = here()
    assert draw("--logs", folder, "--out", tmp_path / "out") == 2
    refused(capsys, *words)
    assert here() == before


BAD_OPTIONS = {
    "unknown figure": (["--only", "figure7"], ["figure7", "unknown figure", "figure8, figure9"]),
    "a misspelt figure": (["--only", "figure8", "tabel3"], ["did you mean table3?"]),
    "a figure without logs": (["--only", "figure9"], ["no numbers for figure9"]),
    "an unknown reading": (["--reading", "wishful"], ["wishful", "published, corrected"]),
    "an unknown option": (["--figure", "8"], ["--figure"]),
    "an abbreviated option": (["--onl", "figure8"], ["--onl"]),
    "an option without its value": (["--out"], ["--out"]),
    "an empty name of a folder": (["--out", ""], ["--out", "empty"]),
    "a second missing folder": (["--logs", "/nowhere/at all"], ["/nowhere/at all", "no such folder"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, tmp_path, capsys, logs, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = here()
    arguments, words = BAD_OPTIONS[case]
    assert draw("--logs", logs, *arguments) == 2
    refused(capsys, *words)
    assert here() == before


def test_out_is_a_file(tmp_path, capsys, logs):
    out = a_file(tmp_path / "x")
    assert draw("--logs", logs, "--out", out) == 2
    refused(capsys, str(out), "is a file")
    assert out.read_bytes() == b"text"


def test_out_lies_in_a_file(tmp_path, capsys, logs, here):
    out = a_file(tmp_path / "x") / "deeper" / "out"
    before = here()
    assert draw("--logs", logs, "--out", out) == 2
    refused(capsys, "is a file")
    assert here() == before


def test_out_cannot_be_written(capsys, logs):
    # Not even root writes there, whoever runs the tests.
    assert draw("--logs", logs, "--out", "/proc/figures") == 2
    refused(capsys, "/proc", "cannot write")


def test_a_folder_stands_where_a_file_belongs(tmp_path, capsys, logs, here):
    (tmp_path / "out/figure8.png").mkdir(parents=True)
    before = here()
    assert draw("--logs", logs, "--out", tmp_path / "out") == 2
    refused(capsys, "figure8.png", "is a folder")
    assert here() == before


def test_disk_full(tmp_path, logs, here):
    """No file may grow beyond 4 kB: writing a picture fails half-way."""
    old = tmp_path / "out"
    old.mkdir()
    (old / "figure8.csv").write_text("old")
    before = here()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    done = command("--logs", logs, "--out", old, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {old}: cannot write the output: ")
    assert done.stderr.count("\n") == 1
    assert here() == before


def test_stdout_full(tmp_path, logs):
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "puzzle.plotting", "--logs", str(logs), "--out", str(tmp_path / "out")]
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"


def test_the_reader_of_the_output_may_leave(tmp_path, logs):
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "puzzle.plotting", "--logs", str(logs), "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "out/figure8.pdf").exists()


def test_a_missing_variant_is_a_gap(tmp_path, capsys):
    logs = figure8(tmp_path / "logs", variants=("dschat", "opt"))
    assert draw("--logs", logs, "--out", tmp_path / "out") == 0
    row = read(tmp_path / "out/figure8.csv")["local (rehearsal)", "7B/350M", "PUZZLE-Base"]
    assert (row["value"], row["n"], row["spread"], row["source"]) == ("", "0", "", "")
    out = capsys.readouterr().out
    assert "missing: figure8 local (rehearsal) 7B/350M PUZZLE-Base: no log" in out
    assert "missing: figure9, figure10, figure11, figure12, table3: no log\n" in out
    assert out.splitlines()[0] == "figure8   end to end, times as fast as DS-Chat: local (rehearsal) 1.33"


def test_a_cut_off_log_is_drawn_and_said(tmp_path, capsys, logs):
    path = logs / "opt/run.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b'"seq":3') + 20])
    assert draw("--logs", logs, "--out", tmp_path / "out", "--only", "figure8") == 0
    assert "report, with 0 notes on numbers and 2 on logs: " in capsys.readouterr().out
    report = (tmp_path / "out/report.md").read_text()
    assert "- opt/run.jsonl:4: line dropped" in report
    assert "- opt/run.jsonl: the run has not ended, or its log is cut off" in report
    assert read(tmp_path / "out/figure8.csv")["local (rehearsal)", "7B/350M", "PUZZLE"]["n"] == "1"


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


def test_the_hosts_fonts_do_not_matter(tmp_path, logs, monkeypatch):
    """Matplotlib's list of fonts is of the host, and a cache of all environments."""
    from matplotlib.font_manager import fontManager

    assert draw("--logs", logs, "--out", tmp_path / "first") == 0
    (own,) = [
        font for font in fontManager.ttflist if font.fname.endswith("mpl-data/fonts/ttf/DejaVuSans.ttf")
    ]
    other = replace(own, fname=own.fname.replace("DejaVuSans", "DejaVuSansMono"))
    for fonts in ([other, own], [other]):
        monkeypatch.setattr(fontManager, "ttflist", fonts)
        vars(type(fontManager))["_findfont_cached"].cache_clear()
        assert draw("--logs", logs, "--out", tmp_path / "second") == 0
        for path in (tmp_path / "first").iterdir():
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_the_results_are_not_buried(tmp_path, capsys):
    """First what each figure says; then where all is, and that it is what was published."""
    assert draw("--out", tmp_path / "out", "--only", "figure9", "table3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "figure9  training, times as fast as without time-sharing: orion 1.06-1.12, phoenix 1.04-1.13",
        "table3   seconds of one context switch: orion PUZZLE 0.08-0.30, DS-Chat 1.67-7.11; phoenix PUZZLE "
        "0.07-0.33,",
        "         DS-Chat 0.96-2.91",
        f"pictures (PDF, PNG) and numbers (CSV): {tmp_path / 'out'}",
        f"report, with 4 notes on numbers and 14 on logs: {tmp_path / 'out/report.md'}",
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


def test_a_report_has_the_pictures_and_their_numbers(tmp_path, logs):
    (logs / "base/run.jsonl").unlink()
    assert draw("--logs", logs, "--out", tmp_path / "out", "--only", "figure8") == 0
    report = (tmp_path / "out/report.md").read_text()
    assert "![figure8](figure8.png)" in report
    assert "| local (rehearsal) | 7B/350M | 1.000 +- 0 (2) | no log | 2.000 +- 0 (2) |" in report
    assert "as published" not in report  # nothing published is drawn


def test_old_files_are_replaced_and_others_kept(tmp_path, logs):
    out = tmp_path / "out"
    out.mkdir()
    (out / "figure8.csv").write_text("old")
    (out / "figure9.csv").write_text("another's")
    assert draw("--logs", logs, "--out", out) == 0
    assert (out / "figure8.csv").read_text().startswith("cluster,")
    assert (out / "figure9.csv").read_text() == "another's"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_only_what_is_wanted(tmp_path):
    assert draw("--only", "table3", "--only", "figure12", "--out", tmp_path / "out") == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"table3", "figure12", "report"}


def test_by_default_into_a_new_folder_here(tmp_path, logs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw("--logs", logs) == 0
    (out,) = tmp_path.glob("outputs_from_logs_*")
    assert (out / "figure8.pdf").exists()


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
