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
    PATIENCE,
    STOPPED,
    Heartbeat,
    PeerState,
    Progress,
    judge,
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
