"""One command at a time writes a folder, on every kind of file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.files import lock

HOLDS = """
import subprocess, sys
from pathlib import Path
from puzzle.files import lock
with lock.hold(Path(sys.argv[1])) as keep:
    child = subprocess.Popen(["sleep", "600"], pass_fds=[keep] if sys.argv[2] == "hands on" else [])
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def killed_holder(folder: Path, how: str) -> tuple[int, int]:
    """Ids of a process that held the folder and was killed, and of its child that lives."""
    command = [sys.executable, "-c", HOLDS, str(folder), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}, "):
            lock._take(folder / lock.NAME)
        holder.kill()
    return holder.pid, child


def test_a_folder_is_held_by_one_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    words = f"^{tmp_path}/out is in use by process {os.getpid()} on .*, Slurm job 17, since 20.*; wait until"
    with lock.hold(tmp_path / "out"):
        with pytest.raises(UserError, match=words), lock.hold(tmp_path / "out"):
            pass
        with lock.hold(tmp_path / "out", ".other"):
            pass
    with lock.hold(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("how", ["keeps to itself", "hands on"])
def test_a_lock_ends_with_all_that_have_it(tmp_path: Path, monkeypatch, how: str) -> None:
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.2)
    _, child = killed_holder(tmp_path, how)
    try:
        if how == "hands on":
            words = rf"the command has ended, but what process \d+ .* still lives \(process {child}\)"
            with pytest.raises(UserError, match=words), lock.hold(tmp_path):
                pass
            monkeypatch.setattr(lock, "ENDING_SECONDS", 60)
            threading.Timer(0.2, os.kill, (child, 9)).start()
        with lock.hold(tmp_path):
            pass
    finally:
        if how != "hands on":
            os.kill(child, 9)


@pytest.mark.parametrize(
    ("locks", "host", "pid", "beats", "free"),
    [
        (False, "here", "own", False, False),
        (False, "here", "dead", True, True),
        (False, "there", "own", True, False),
        (False, "there", "own", False, True),
        (True, "there", "own", True, False),
        (True, "there", "own", False, True),
        (True, "here", "own", False, True),
        (True, "here", "torn", False, True),
    ],
)
def test_file_systems_that_lock_nothing_or_one_host_alone(
    tmp_path: Path, monkeypatch, locks: bool, host: str, pid: str, beats: bool, free: bool
) -> None:
    """A record by which another host, or process, may be alive; a lock that keeps nobody out."""
    flock = fcntl.flock

    def no_locks(descriptor: int, how: int) -> None:
        if not locks:
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    holder = lock.Holder.here()
    holder = replace(holder, host="node9") if host == "there" else holder
    holder = replace(holder, began="1") if pid == "dead" else holder
    path = tmp_path / lock.NAME
    path.write_text("{" if pid == "torn" else json.dumps(asdict(holder)))
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.01):
            os.utime(path)

    beat = threading.Thread(target=renew)
    if beats:
        beat.start()
    try:
        if free:
            over.set() if pid == "dead" else None
            descriptor = lock._take(path)
            os.close(descriptor)
        else:
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on {holder.host}"):
                lock._take(path)
    finally:
        over.set()
        if beats:
            beat.join()
