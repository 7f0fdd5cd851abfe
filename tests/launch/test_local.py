import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puzzle.configio import build
from puzzle.errors import UserError
from puzzle.launch import local
from tests.launch.running import config

TARGETS = "tests.launch.targets"
FAILING = "tests.launch.failing:meets_failure"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids(folder: Path, world: int, seconds: float = 60) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts = [p.read_text() for p in folder.glob("*.pid")]
        if len(texts) == world and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError("workers did not start")


def gone(processes: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, processes)):
        time.sleep(0.05)
    return not any(map(alive, processes))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_workers_meet_and_share_the_cores(tmp_path, monkeypatch):
    local.run(f"{TARGETS}:add_ranks", (tmp_path,), 3, tmp_path / "ranks")
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / f"{r}.txt").read_text() for r in range(3)] == [f"3.0 {r} {threads}" for r in range(3)]
    assert (tmp_path / "ranks/rank-002.txt").read_text() == "hello from 2\n"
    assert not (tmp_path / "ranks/rank-000.txt").exists()
    assert "RANK" not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("user", UserError, "the third prompt is empty"),
        ("disk", UserError, "somewhere/file: No space left on device"),
        ("bug", local.WorkerError, "rank 1 on .*: ValueError: a bug; its log: .*rank-001.txt"),
        ("kill", local.WorkerError, r"rank 1 on .*: killed by SIGKILL \(out of memory, or by hand\)"),
    ],
)
def test_first_failure_ends_all_with_its_line(tmp_path, kind, error, words):
    with pytest.raises(error, match=words) as raised:
        local.run(f"{TARGETS}:fail", (tmp_path, kind), 3, tmp_path / "ranks")
    assert time.time() - (tmp_path / "1.failed").stat().st_mtime < 10
    assert gone(pids(tmp_path, 3, 1), 0)
    if kind == "bug":
        assert raised.value.code == 1
        assert "with details" in (tmp_path / "ranks/rank-001.txt").read_text()
    if kind == "kill":
        assert raised.value.code == 137


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("memory", UserError, r"^CUDA out of memory on rank 1; most of it, [\d.]+ GiB, is .+: .+$"),
        ("bug", local.WorkerError, "^rank 1 on .*: ValueError: a bug; its log: .*rank-001.txt$"),
        ("file", UserError, "^checkpoint 1 failed: rank-00001.safetensors: No space left on device; free "),
    ],
)
def test_a_failure_of_one_rank_in_a_run_ends_all_within_ten_seconds(tmp_path, kind, error, words):
    """The others wait for it: in a pipeline's messages, or for its file of a checkpoint."""
    run = build(config(layout={"tp": 1, "pp": 2, "dp": 1}), str)
    with pytest.raises(error, match=words):
        local.run(FAILING, (run.resolved(), str(tmp_path), kind), 2, tmp_path / "ranks")
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 10
    assert json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_parent(tmp_path, number):
    code = (
        "import sys; from pathlib import Path; from puzzle.launch import local\n"
        f"local.run('{TARGETS}:sleep', (Path(sys.argv[1]),), 2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    workers = pids(tmp_path, 2)
    parent.send_signal(number)
    parent.communicate(timeout=20)
    assert parent.returncode != 0
    assert gone(workers)


def test_one_process_may_die_apart_from_this_one():
    with pytest.raises(local.WorkerError, match=r"rank 0 on .*: killed by SIGABRT") as raised:
        local.run("os:abort", (), 1, apart=True)
    assert raised.value.code == 128 + signal.SIGABRT


def test_one_process_is_a_plain_call(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(local, "_resolve", lambda target: calls.append)
    local.run("nowhere:nothing", (1,), 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    local.run("nowhere:nothing", (2,), 4)
    assert calls == [1, 2]
    assert local.identity() == (1, 4)
    with pytest.raises(UserError, match="4 processes were started but tp x pp x dp is 2"):
        local.run("nowhere:nothing", (3,), 2)
