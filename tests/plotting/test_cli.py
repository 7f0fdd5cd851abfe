"""The command: every bad input is one clear line and exit code 2, and nothing is half-written."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.plotting.builders import ROOT, figure8, read, write
from tests.plotting.commands import draw, raw, refused
from tests.runlog import texts


@pytest.fixture
def logs(tmp_path):
    return figure8(tmp_path / "logs")


@pytest.fixture
def here(tmp_path):
    """What lies in the folder of a test, with the content of files; unchanged after a refused command."""
    return lambda: {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}


def command(*arguments, **options):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "puzzle.plotting", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options)


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


def test_by_default_into_a_new_folder_here(tmp_path, logs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw("--logs", logs) == 0
    (out,) = tmp_path.glob("outputs_from_logs_*")
    assert (out / "figure8.pdf").exists()
