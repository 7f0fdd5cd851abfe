"""Hangs end, with their cause in one line and the stacks of all ranks; work that takes long does not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.launch import local
from tests.helpers import PATIENCE
from tests.launch.test_local import TARGETS, gone, no_launcher, pids

__all__ = ["no_launcher"]
STOPPED = (
    3.0,
    r"rank 1 on \S+ is stopped \(SIGSTOP, or a debugger\): no sign of life for \d+ s, last in "
    r"(the lesson|starting).*; rank 0 on \S+ waits in the lesson: "
    r"all_reduce of float32 \(4,\) over ranks 0, 1 \(\d+ s\)",
)
HANGS = {
    "stop 1": STOPPED,
    "busy": STOPPED,
    "recv": (
        2.0,
        r"rank 0 on \S+ has waited for \d+ s in the lesson: all_reduce of float32 \(4,\) over ranks 0, 1; "
        r"rank 1 on \S+ waits in the lesson: recv of float32 \(2, 3\) from rank 0 \(\d+ s\)"
        r"|rank 1 on \S+ has waited for \d+ s in the lesson: recv of float32 \(2, 3\) from rank 0; "
        r"rank 0 on \S+ waits in the lesson: all_reduce of float32 \(4,\) over ranks 0, 1 \(\d+ s\)",
    ),
    "endless": (
        0.6,
        r"rank 1 on \S+ has computed without progress for \d+ s in the lesson; rank 0 .*"
        r"; if it needs longer, raise launch.watchdog",
    ),
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_ends_and_names_its_cause(tmp_path: Path, kind: str) -> None:
    seconds, words = HANGS[kind]
    with pytest.raises(local.WorkerError) as raised:
        local.run(f"{TARGETS}:watched", (tmp_path, kind, seconds), 2, tmp_path / "ranks")
    line = str(raised.value)
    assert re.fullmatch(f"(?:{words}); stacks: .*ranks", line), line
    assert gone(pids(tmp_path, 2, 1), 0)
    assert not list(tmp_path.glob("*.txt"))
    stacks = [(tmp_path / f"ranks/rank-00{rank}.txt").read_text() for rank in range(2)]
    assert "in sum" in stacks[0]
    assert "in watched" in stacks[1]
    if kind == "endless":  # it saved until the verdict, which comes before the stacks
        saved, verdict = (tmp_path / name for name in ("saved", "ranks/rank-001.txt"))
        assert saved.stat().st_mtime_ns <= verdict.stat().st_mtime_ns


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_stopped_rank_of_another_launcher(tmp_path: Path, victim: int) -> None:
    """Nobody watches the processes, and rank 0 holds the store in which they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import sys; from pathlib import Path; from tests.launch.targets import watched\n"
        f"watched(Path(sys.argv[1]), 'stop {victim}', 3.0)"
    )
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1 - victim].returncode == 1
    assert ranks[victim].returncode == -signal.SIGKILL
    errors = [line for line in said[1 - victim].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    words = (
        "error: rank 1 on .* is stopped"
        if victim
        else r"error: the run's store at \S+ does not answer rank 1"
    )
    assert re.match(words, errors[0])


def test_a_stopped_rank_of_another_host_of_which_nobody_knows(tmp_path: Path) -> None:
    # Silent, or still since then: whichever of its last sign and its last move is judged first.
    words = r"^rank 1 on host1 (does not answer: no sign of life|has computed without progress) for [67] s"
    with pytest.raises(local.WorkerError, match=words):
        local.run(f"{TARGETS}:watched", (tmp_path, "away", 0.6), 2, tmp_path / "ranks")
    assert gone(pids(tmp_path, 2, 1), 0)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("slow", 2.0), ("native", 2.0), pytest.param("limited", 0.6, marks=pytest.mark.long)],
)
def test_work_that_takes_long_is_let_be(tmp_path: Path, kind: str, seconds: float) -> None:
    local.run(f"{TARGETS}:watched", (tmp_path, kind, seconds), 2, tmp_path / "ranks")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [str([2.0] * 4)] * 2
    assert not (tmp_path / "ranks/rank-000.txt").exists()
