"""Runs of the command line as other processes, for tests that end them in all ways."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from puzzle.runlog import load_runs
from tests.helpers import PATIENCE

ROOT = Path(__file__).parents[2]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def config(**changes: Any) -> dict[str, Any]:
    """A run of four processes, as small as can be; `changes` replace sections."""
    return {
        "iterations": 3,
        "batch": 4,
        "device": "cpu",
        "layout": {"tp": 1, "pp": 4, "dp": 1},
        **{role: {"init": SHAPE} for role in ("actor", "critic", "reward")},
        "data": {"random_tokens": 8},
        "generation": {"min_new_tokens": 4, "max_new_tokens": 4},
        "algorithm": {"microbatch": 2},
        "checkpoint": {"every": 1},
        "log": {
            "provenance": "rehearsal",
            "variant": "tiny",
            "plots": False,
            "samples": 0,
        },
        **changes,
    }


def environment(**values: str) -> dict[str, str]:
    """Of the processes that tests start; marked, so that all of them can be found again."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONDONTWRITEBYTECODE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **values}


def puzzle(folder: Path, *words: str, **values: str) -> subprocess.Popen[str]:
    """`puzzle WORDS` in `folder`, its output in folder/console.txt; in a session of its own."""
    with (folder / "console.txt").open("w") as console:
        return subprocess.Popen(
            [sys.executable, "-m", "puzzle.cli", *words],
            cwd=folder,
            env=environment(PUZZLE_TEST=str(folder), **values),
            stdout=console,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def console(folder: Path) -> str:
    """What the command has said."""
    return (folder / "console.txt").read_text(errors="replace")


def metrics(run: Path) -> list[dict[str, float]]:
    """Metrics of every iteration in a run's log; of one that was run again, the later ones."""
    return [dict(iteration.metrics) for iteration in load_runs(run).runs[0].iterations]


def wait_for(condition: Callable[[], Any], run: subprocess.Popen | None = None) -> Any:
    """The condition's first true value; an error if `run` ends before or it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert run is None or run.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found


def of_test(folder: Path) -> dict[int, str]:
    """Command lines, by id, of living processes that carry the mark of a test in `folder`."""
    found = {}
    mark = f"PUZZLE_TEST={folder}".encode()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            marked = process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0")
            if marked and (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found[int(process.name)] = (process / "cmdline").read_bytes().decode().replace("\0", " ")
    found.pop(os.getpid(), None)
    return found


def ranks(folder: Path) -> list[int]:
    """Process ids of the ranks of a test's run on this host, in the order of their start."""
    servers = {pid for pid, line in of_test(folder).items() if "multiprocessing.forkserver" in line}
    return sorted(pid for pid in servers if _parent(pid) in servers)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


@contextlib.contextmanager
def cleared(folder: Path) -> Generator[None]:
    """Whatever happens, no process of the test stays; what was left is an error."""
    try:
        yield
        wait_for(lambda: not of_test(folder))
    finally:
        for pid in of_test(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses (IPv4, or IPv6 in full) on which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                # Words of 32 bits in the host's order, little-endian on all hosts that torch knows.
                address = bytes.fromhex(words[1].partition(":")[0])
                parts = [address[at : at + 4][::-1] for at in range(0, len(address), 4)]
                found.add(socket.inet_ntop(family, b"".join(parts)))
    return found
