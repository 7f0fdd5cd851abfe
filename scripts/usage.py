"""What a command needs: python scripts/usage.py LOG COMMAND...

Adds a line of JSON to LOG: its seconds, the CPU seconds of the processes seen, and the most memory that all
of them had at once (the sum of their proportional shares, looked at every second). Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "PUZZLE_USAGE"
TICKS = os.sysconf("SC_CLK_TCK")


def processes(mark: bytes) -> list[Path]:
    """Of this command, by a mark in what they inherited."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:
            continue  # ended, or another user's
    return found


def memory(process: Path) -> int:
    """Bytes: what it has alone, and its share of what it has with others."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def cpu(process: Path) -> float:
    """Seconds of its own so far."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main(log: Path, command: list[str]) -> int:
    """Run it, and leave the line; its exit code."""
    mark = f"{MARK}={uuid.uuid4()}"
    began, peak, used = time.monotonic(), 0, dict[str, float]()
    running = subprocess.Popen(command, env={**os.environ, MARK: mark.partition("=")[2]})
    while running.poll() is None:
        now = 0
        for process in processes(mark.encode()):
            try:
                now += memory(process)
                used[process.name] = max(used.get(process.name, 0.0), cpu(process))
            except OSError:
                continue
        peak = max(peak, now)
        time.sleep(1)
    row = {
        "command": command,
        "code": running.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(sum(used.values()), 1),
        "peak_bytes": peak,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row)
    return running.returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: usage.py LOG COMMAND...")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
