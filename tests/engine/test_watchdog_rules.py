"""Who hangs, judged from signs of life alone; the watchdog among real processes is in tests/launch."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore

from puzzle.engine.runtime.watchdog import (
    AWAY,
    BUSY,
    DUMP,
    PATIENCE,
    STOPPED,
    Heartbeat,
    PeerState,
    Progress,
    judge,
    process_state,
    vouch,
)

N = 10.0
NOW = 1000.0


def seen(
    rank: int, moved: float, waits: bool = True, silent: float = 0.0, over: bool = False, limit: float = 0.0
) -> PeerState:
    """A rank that moved so many seconds ago and showed a sign of life so many seconds ago."""
    sign = Heartbeat(rank, "host", 100 + rank, doing=f"work {rank}", waits=waits, over=over, limit=limit)
    return PeerState(sign, NOW - silent, NOW - moved)


CASES = [
    ("all move", [seen(0, 1), seen(1, 2, False)], None),
    ("one moves while others wait", [seen(0, 500), seen(1, 2, False)], None),
    ("all wait, not for long", [seen(0, 9), seen(1, 20)], None),
    (
        "all wait",
        [seen(0, 12), seen(1, 20)],
        "rank 1 on host has waited for 20 s in work 1; rank 0 on host waits in",
    ),
    ("one computes", [seen(0, 99), seen(1, 99, False)], None),
    (
        "one computes for too long",
        [seen(0, PATIENCE * N), seen(1, 101, False)],
        "rank 1 on host has computed without progress for 101 s in work 1; rank 0 on host waits in work 0",
    ),
    ("one computes as its limit lets it", [seen(0, 599), seen(1, 599, False, limit=500)], None),
    ("it may be without end", [seen(0, 1e7), seen(1, 1e7, False, limit=math.inf)], None),
    (
        "it does not keep its limit",
        [seen(0, 650), seen(1, 700, False, limit=500)],
        "rank 1 on host has computed without progress for 700 s in work 1; rank 0 on host waits in work 0",
    ),
    ("all compute for ever", [seen(0, 10_000, False), seen(1, 9_000, False)], None),
    ("who has ended is not missed", [seen(0, 3), seen(1, 500, silent=500, over=True)], None),
    ("and does not wait", [seen(0, 50, False), seen(1, 500, over=True)], None),
    (
        "a stopped rank",
        [seen(0, 3), seen(1, 11, silent=11)],
        f"rank 1 on host {STOPPED}: no sign of life for 11 s, last in",
    ),
    ("a sign is late", [seen(0, 3), seen(1, 9, silent=9)], None),
]


@pytest.mark.parametrize(("_name", "ranks", "line"), CASES, ids=[case[0] for case in CASES])
def test_rules(_name: str, ranks: list[PeerState], line: str | None) -> None:
    verdict = judge(ranks, NOW, N, lambda sign: STOPPED)
    assert (verdict is None) == (line is None), verdict
    if verdict is not None:
        assert verdict.line.startswith(str(line))
        assert "\n" not in verdict.line


def test_native_code_without_signs_counts_as_computing() -> None:
    ranks = [seen(0, 60), seen(1, 60, silent=60)]
    assert judge(ranks, NOW, N, lambda sign: BUSY) is None
    ranks = [seen(0, 120), seen(1, 120, silent=120)]
    verdict = judge(ranks, NOW, N, lambda sign: BUSY)
    assert verdict is not None
    assert verdict.line.startswith("rank 1 on host has computed without progress for 120 s")
    assert verdict.silent == (1,)


def test_a_silent_rank_of_another_host_may_compute_unless_its_host_knows_better() -> None:
    ranks = [seen(0, 99), seen(1, 99, silent=99)]
    assert judge(ranks, NOW, N, lambda sign: AWAY) is None
    ranks = [seen(0, 599), seen(1, 599, silent=599, limit=500)]
    assert judge(ranks, NOW, N, lambda sign: AWAY) is None
    ranks = [seen(0, 99), seen(1, PATIENCE * N, silent=PATIENCE * N)]
    verdict = judge(ranks, NOW, N, lambda sign: AWAY)
    assert verdict is not None
    assert verdict.line.startswith(f"rank 1 on host {AWAY}: no sign of life for 100 s")


def test_a_host_vouches_for_its_ranks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        child.send_signal(signal.SIGSTOP)
        while "(stopped)" not in Path(f"/proc/{child.pid}/status").read_text():
            time.sleep(0.01)
        store = HashStore()
        for rank, pid in ((4, os.getpid()), (5, child.pid)):
            sign = Heartbeat(rank, socket.gethostname(), pid)
            PrefixStore("watchdog/0", store).set(str(rank), json.dumps(asdict(sign)))
        vouch(store, range(4, 7))  # the last has shown no sign yet
    finally:
        child.kill()
        child.communicate()
    states = PrefixStore("watchdog/0/state", store)
    assert [states.get(rank).decode() for rank in "45"] == [BUSY, STOPPED]
    assert not states.check(["6"])


def test_what_the_system_knows_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    here = socket.gethostname()
    while "State:\tZ" not in Path(f"/proc/{child.pid}/status").read_text():
        time.sleep(0.01)
    assert process_state(Heartbeat(0, here, child.pid)) == "is gone"  # nobody has fetched its exit code yet
    child.wait()
    assert process_state(Heartbeat(0, here, child.pid)) == "is gone"
    assert process_state(Heartbeat(0, here, os.getpid())) == BUSY
    assert process_state(Heartbeat(0, f"not-{here}", os.getpid())) == AWAY


TRACED = """
import ctypes, os, signal
assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0  # PTRACE_TRACEME: stops are the parent's to see
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_process_under_a_debugger_counts_as_stopped() -> None:
    child = subprocess.Popen([sys.executable, "-c", TRACED], stderr=subprocess.DEVNULL)
    try:
        status = Path(f"/proc/{child.pid}/status")
        while "(tracing stop)" not in (text := status.read_text()) and "(zombie)" not in text:
            time.sleep(0.01)
        if "(zombie)" in text:
            pytest.skip("this host lets nobody trace")
        assert process_state(Heartbeat(0, socket.gethostname(), child.pid)) == STOPPED
    finally:
        # Popen's own kill and wait take a stop that they are told of for the end.
        os.kill(child.pid, signal.SIGKILL)
        while os.WIFSTOPPED(os.waitpid(child.pid, 0)[1]):
            pass
        child.returncode = -signal.SIGKILL


def test_signs_count_beats_and_changes_apart() -> None:
    state = PeerState(Heartbeat(0, "host", 1, beat=1, moves=1), 0.0, 0.0)
    for now, sign, times in (
        (1.0, {"beat": 2, "moves": 1}, (1.0, 0.0)),
        (2.0, {"beat": 2, "moves": 1}, (1.0, 0.0)),
        (3.0, {"beat": 3, "moves": 2}, (3.0, 3.0)),
        (4.0, {"beat": 4, "moves": 2, "waits": True}, (4.0, 4.0)),
        (5.0, {"beat": 4, "moves": 3, "waits": True}, (4.0, 5.0)),
    ):
        newer = Heartbeat(0, "host", 1, **sign)  # ty: ignore[invalid-argument-type]
        state.update(newer, now)
        assert (state.beat_at, state.moved_at, state.sign) == (*times, newer)


STUCK = """
import os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from puzzle.engine.runtime.progress import Progress
from puzzle.engine.runtime.watchdog import Watch, Watchdog

def another_thread():
    threading.Event().wait()

store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
watch = Watch(60.0, lambda line, first: None, Path(sys.argv[1]))
well = Watchdog(watch, 3, 4, Progress(), {})
assert Path(sys.argv[1], "rank-003.txt").exists()
well.stop(over=True)
assert not list(Path(sys.argv[1]).iterdir()), "nothing was written"
progress, moved = Progress(), {"all_reduce": 5}
dog = Watchdog(watch, 0, 4, progress, moved)
threading.Thread(target=another_thread, daemon=True).start()
signs = []
changes = [None, lambda: progress.mark("a pass"), None, lambda: moved.update(all_reduce=6), progress.tick]
for change in changes:
    if change is not None:
        change()
    dog._publish()
    signs.append(dog._signs())
assert [len(ranks) for ranks in signs] == [2] * 5, signs  # this one, and the one that has ended
assert [mine.rank for mine, _ in signs] == [0] * 5
assert all(other.over and other.rank == 3 for _, other in signs)
first, passed, same, sent, ticked = (mine for mine, _ in signs)
assert not first.over and not first.waits and first.doing == "starting" and passed.doing == "a pass"
assert first.moves < passed.moves == same.moves < sent.moves < ticked.moves
assert first.beat < passed.beat < same.beat < sent.beat < ticked.beat
print("ready", flush=True)
time.sleep(600)
"""


def test_who_is_told_to_writes_the_stacks_of_all_threads_and_ends(tmp_path: Path) -> None:
    """And what a rank publishes of itself before."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path / "stacks")], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(DUMP)
        child.communicate()
    finally:
        child.kill()
    assert child.returncode == -DUMP
    text = (tmp_path / "stacks" / "rank-000.txt").read_text()
    assert "in another_thread" in text
    assert "in <module>" in text


def test_a_line_names_three_others_at_most() -> None:
    verdict = judge([seen(rank, 20 + rank) for rank in range(8)], NOW, N, lambda sign: STOPPED)
    assert verdict is not None
    assert verdict.line.startswith("rank 7 ")
    assert verdict.line.endswith("rank 2 on host waits in work 2 (22 s); 4 more wait")


def test_a_pulse_says_what_it_waits_for_and_goes_back() -> None:
    progress = Progress()
    progress.mark("iteration 3")
    before = progress.count
    with progress.waiting("all-gather"):
        assert (progress.doing, progress.waits) == ("iteration 3: all-gather", True)
    assert (progress.doing, progress.waits) == ("iteration 3", False)
    assert progress.count > before
    with progress.busy("score", 30.0):
        assert (progress.doing, progress.waits, progress.limit) == ("iteration 3: score", False, 30.0)
    assert (progress.doing, progress.limit) == ("iteration 3", 0.0)
    count = progress.count
    progress.tick()
    assert progress.count == count + 1
