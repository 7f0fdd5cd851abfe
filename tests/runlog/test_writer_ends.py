"""Logs whose writers are resumed, killed, or out of room."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.files import lock
from puzzle.runlog import Run, RunWriter
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.records import (
    End,
    Iteration,
    Resume,
    Switch,
    Warned,
)
from tests.runlog import texts
from tests.runlog.writing import read, write


def test_a_folder_holds_one_run(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        RunWriter(tmp_path, texts.header())


def test_resume_goes_on_in_the_same_file(tmp_path):
    write(tmp_path)
    layouts = {"training": {"tp": 2, "pp": 1, "dp": 1}}
    with RunWriter(tmp_path, texts.header(run_id="other", layouts=layouts), resume=True) as writer:
        assert writer.run_id == "abc"
        writer.write(Resume(2, "checkpoints/1"))
        for index in (2, 3):
            parts, e2e = texts.stages(9.0, 0.5, 2.0)
            writer.write(Switch(index, 0.5))
            writer.write(Iteration(index, parts, e2e, {}))
    run = read(tmp_path)
    assert [one.stage_seconds["generation"] for one in run.iterations] == [1.5, 2.5, 9.0, 9.0]
    assert [(switch.iteration, switch.seconds) for switch in run.switches] == [
        (0, 0.25),
        (1, 0.25),
        (2, 0.5),
        (3, 0.5),
    ]
    assert [report.what for report in run.reports] == ["resumed at iteration 2 with other layouts"]
    assert not run.ended


@pytest.mark.parametrize(
    "changes", [{"variant": "base"}, {"cluster": "other"}, {"repeat": 1}, {"provenance": "measured"}]
)
def test_another_run_is_not_resumed(tmp_path, changes):
    write(tmp_path)
    with pytest.raises(UserError, match="holds a run with"):
        RunWriter(tmp_path, texts.header(**changes), resume=True)


def test_warnings_and_ends_say_when_and_why(tmp_path):
    with RunWriter(tmp_path, texts.header()) as writer:
        writer.write(Warned("odd", iteration=3))
        writer.write(Warned("at no time"))
        writer.write(End("failed", "no room"))
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [(one["text"], one.get("iteration")) for one in records[1:3]] == [("odd", 3), ("at no time", None)]
    assert (records[3]["status"], records[3]["text"]) == ("failed", "no room")
    said = (tmp_path / "run.log").read_text().splitlines()
    assert [line[20:] for line in said[-3:]] == [
        "warning: odd (iteration 3)",
        "warning: at no time",
        "end: failed: no room",
    ]


def test_a_resumed_log_has_no_empty_lines(tmp_path):
    """Only what was torn is closed with a newline."""
    for resume in (False, True, True):
        with RunWriter(tmp_path, texts.header(), resume=resume) as writer:
            if resume:
                writer.write(Resume(0))
            writer.write(Warned("odd"))
    for name in ("run.jsonl", "run.log"):
        assert all(line.strip() for line in (tmp_path / name).read_text().splitlines())


def test_a_closed_log_holds_no_file_open(tmp_path):
    """Nor does one whose end was written; both may be closed again."""
    for name in ("closed", "ended"):
        before = os.listdir("/proc/self/fd")
        writer = RunWriter(tmp_path / name, texts.header())
        assert len(os.listdir("/proc/self/fd")) == len(before) + 3
        writer.close() if name == "closed" else writer.write(End("completed"))
        assert len(os.listdir("/proc/self/fd")) == len(before)
        writer.close()


def test_resume_of_nothing_starts(tmp_path):
    with RunWriter(tmp_path, texts.header(), resume=True) as writer:
        writer.write(End("completed"))
    assert read(tmp_path).reports == ()


def test_a_log_cut_at_any_byte_reads_and_goes_on(tmp_path):
    whole = (write(tmp_path / "whole", count=2) / "run.jsonl").read_bytes()
    full = read(tmp_path / "whole")
    first_line = whole.index(b"\n")
    folder = tmp_path / "cut"
    for size in range(len(whole)):
        folder.mkdir(exist_ok=True)
        (folder / "run.jsonl").write_bytes(whole[:size])
        run = read_jsonl(folder / "run.jsonl")
        if size < first_line:
            assert not isinstance(run, Run)
        else:
            assert isinstance(run, Run)
            assert run.iterations == full.iterations[: len(run.iterations)]
            last = whole[:size].rsplit(b"\n", 1)[-1]
            torn = last not in (b"", whole.split(b"\n")[whole[:size].count(b"\n")])
            assert bool(run.reports) == torn, (size, run.reports)
        # Going on is slower to try: at every line's ends, and here and there between.
        if size % 29 and b"\n" not in whole[size - 2 : size + 2]:
            continue
        with RunWriter(folder, texts.header(), resume=True) as writer:
            writer.write(Resume(1))
            parts, e2e = texts.stages(7.0, 0.5, 2.0)
            writer.write(Iteration(1, parts, e2e, {}))
        after = read(folder)
        assert after.iterations[-1].stage_seconds["generation"] == 7.0
        assert not [report for report in after.reports if "missing before" in report.what]
        for name in ("run.jsonl", "run.log", "samples.jsonl"):
            (folder / name).unlink()


def test_a_killed_writer_leaves_a_readable_log(tmp_path):
    code = (
        "from pathlib import Path; from puzzle.runlog import RunWriter\n"
        "from puzzle.runlog.records import Iteration; from tests.runlog import texts\n"
        f"writer = RunWriter(Path({str(tmp_path)!r}), texts.header())\n"
        "for index in range(10**6):\n"
        "    writer.write(Iteration(index, *texts.stages(1.0 + index, 0.5, 2.0), {'kl': 0.5}))\n"
        "    if index == 20: print('go', flush=True)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run = read(tmp_path)
    assert len(run.iterations) > 20
    assert [one.stage_seconds["generation"] for one in run.iterations] == [
        1.0 + index for index in range(len(run.iterations))
    ]
    assert not run.ended


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path):
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"^cannot write .*run\.jsonl: No space left on device; free space"
    ) as error:
        RunWriter(tmp_path, texts.header(), resume=True)
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_tears_one_line(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path, texts.header())
    parts, e2e = texts.stages(1.0, 0.5, 2.0)
    writer.write(Iteration(0, parts, e2e, {}))
    real = os.write

    def full(descriptor, data):
        real(descriptor, data[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left"):
        writer.write(Iteration(1, parts, e2e, {}))
    monkeypatch.setattr(os, "write", real)
    writer.write(Iteration(2, parts, e2e, {}))
    writer.close()
    run = read(tmp_path)
    assert [one.iteration for one in run.iterations] == [0, 2]
    assert any("torn or damaged" in report.what for report in run.reports)
    assert any("iterations are missing" in report.what for report in run.reports)


def test_every_record_is_one_write(tmp_path, monkeypatch):
    written = []
    real = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: written.append(bytes(data)) or real(descriptor, data)
    )
    write(tmp_path, count=1)
    assert all(re.fullmatch(rb"[^\n].*\n", data, re.DOTALL) for data in written)
    assert sum(data.startswith(b'{"record"') for data in written) == (
        tmp_path / "run.jsonl"
    ).read_bytes().count(b"\n")


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunWriter(tmp_path / "file" / "run", texts.header())


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_the_umask_says_who_reads_and_writes_logs_and_locks(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with lock.hold(tmp_path / "run"):
            write(tmp_path / "run")
            modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").iterdir() if p.is_file()}
    finally:
        os.umask(before)
    assert {".lock", "run.jsonl", "run.log"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~mask}
