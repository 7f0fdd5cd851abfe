"""What dies, hangs, fills up or breaks, by launcher: how the command ends, what it says, what stays."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import PATIENCE
from tests.launch.running import cleared, config, console, metrics, of_test, puzzle, ranks, wait_for

ITERATIONS = 20


@dataclass(frozen=True)
class Fault:
    """`strike(folder)` once the run has checkpoints (with `again`, between it and its resumption); then the
    command ends with `code`, having said `words` (parentheses in them are plain)."""

    name: str
    strike: Callable[[Path], None]
    code: int
    words: str = ""
    launcher: str = "local"
    again: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def rank(number: int, what: int) -> Callable[[Path], None]:
    return lambda folder: os.kill(ranks(folder)[number], what)


def process(part: str, what: int) -> Callable[[Path], None]:
    """Signals the first process of the test with `part` in its command line; not one that only starts it."""

    def strike(folder: Path) -> None:
        found = of_test(folder).items()
        os.kill(min(p for p, line in found if part in line and not line.startswith(("srun", "sbatch"))), what)

    return strike


def srun(what: int) -> Callable[[Path], None]:
    return lambda folder: os.kill(
        min(p for p, line in of_test(folder).items() if line.startswith("srun")), what
    )


def newest(folder: Path) -> Path:
    return max((folder / "out/checkpoints").glob("state-*[0-9]"), key=lambda path: int(path.name[6:]))


def break_config(folder: Path) -> None:
    (folder / "run.yaml").write_text("layout: {tp: 1, pp: 4\nbatch: 4\n")


def unknown_key(folder: Path) -> None:
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + "bach: 4\n")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def tear_log(folder: Path) -> None:
    with (folder / "out/run.jsonl").open("a") as log:
        log.write('{"record": "iteration", "se')


def fill(folder: Path) -> None:
    """Leave the small file system of the run no room for another checkpoint."""
    with (folder / "out/ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


@contextlib.contextmanager
def small_disk(folder: Path) -> Generator[None]:
    """`folder` on 8 MiB of its own, where this host lets us mount them."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # if the run still lives, too


def cancel_job(folder: Path) -> None:
    word = next(line for line in console(folder).splitlines() if line.startswith("Slurm job "))
    subprocess.run(["scancel", word.split()[2].rstrip(";")], check=True)


COMMAND = "puzzle.cli train"
AGENT = "puzzle.launch.agent"
GCS = "gcs/gcs_server"
RESTARTED = {"launch": {"max_restarts": 1}}
KILLED = "killed by SIGKILL (out of memory, or by hand)"
WATCHED = {"launch": {"watchdog": 10}}
FAULTS = (
    # Ranks
    Fault("rank-0-killed", rank(0, signal.SIGKILL), 137, f"rank 0 on .*{KILLED}"),
    Fault("rank-3-killed", rank(3, signal.SIGKILL), 137, f"rank 3 on .*{KILLED}; its log: .*rank-003.txt"),
    Fault("rank-crashed", rank(1, signal.SIGSEGV), 139, "rank 1 on .*: killed by SIGSEGV"),
    Fault("rank-killed-then-resumed", rank(2, signal.SIGKILL), 0, f"rank 2 on .*{KILLED}", changes=RESTARTED),
    Fault("rank-stopped", rank(2, signal.SIGSTOP), 1, "rank 2", changes=WATCHED),
    # The command and what it starts
    Fault("interrupted", process(COMMAND, signal.SIGINT), 130, "interrupted"),
    Fault("terminated", process(COMMAND, signal.SIGTERM), 143),
    Fault("command-killed", process(COMMAND, signal.SIGKILL), -9),
    Fault("forkserver-killed", process("forkserver", signal.SIGKILL), 137, f"fork server was {KILLED}"),
    # Files
    Fault("config-broken", break_config, 2, "error: run.yaml:.* not valid YAML", again=True),
    Fault("config-unknown-key", unknown_key, 2, "bach: unknown key; did you mean batch", again=True),
    Fault("checkpoint-file-removed", lambda f: (newest(f) / "rank-00001.safetensors").unlink(), 0,
          "is damaged: .*rank-00001.safetensors", again=True),
    Fault("checkpoint-file-short", lambda f: shorten(newest(f) / "rank-00002.safetensors"), 0,
          "is damaged: .*rank-00002.safetensors", again=True),
    Fault("manifest-removed", lambda f: (newest(f) / "manifest.json").unlink(), 0, "is damaged", again=True),
    Fault("manifest-short", lambda f: shorten(newest(f) / "manifest.json"), 0, "is damaged", again=True),
    Fault("checkpoints-removed", lambda f: shutil.rmtree(f / "out/checkpoints"), 0,
          "no checkpoint to resume from: the run begins again", again=True),
    Fault("log-torn", tear_log, 0, "", again=True),
    Fault("log-removed", lambda f: (f / "out/run.jsonl").unlink(), 2, "holds no run", again=True),
    Fault("disk-full", fill, 2, "error: .*No space left on device"),
    # Slurm
    Fault("slurm-rank-killed", rank(1, signal.SIGKILL), 137, f"rank . on node.: {KILLED}", "slurm"),
    Fault("slurm-rank-stopped", rank(1, signal.SIGSTOP), 1, "error: .*rank ", "slurm", changes=WATCHED),
    Fault("slurm-agent-killed", process(AGENT, signal.SIGKILL), 137,
          "error: rank . on node.: its agent was killed", "slurm"),
    Fault("slurm-agent-stopped", process(AGENT, signal.SIGSTOP), 1, "silent for 30 s", "slurm"),
    Fault("slurm-srun-killed", srun(signal.SIGKILL), 137, "error: ", "slurm"),
    Fault("slurm-job-cancelled", cancel_job, 143, "", "slurm"),
    Fault("slurm-interrupted", process(COMMAND, signal.SIGINT), 130, "interrupted", "slurm"),
    # Ray
    Fault("ray-rank-killed", rank(1, signal.SIGKILL), 137, f"rank 1 on .*{KILLED}", "ray"),
    Fault("ray-rank-killed-then-resumed", rank(1, signal.SIGKILL), 0, KILLED, "ray", changes=RESTARTED),
    Fault("ray-agent-killed", process(AGENT, signal.SIGKILL), 137, "an agent ended with code", "ray"),
    Fault("ray-actor-killed", process("ray::Agent", signal.SIGKILL), 1, "its Ray actor is gone", "ray"),
    Fault("ray-raylet-killed", process("raylet/raylet", signal.SIGKILL), 1, "error: ", "ray"),
    Fault("ray-gcs-killed", process(GCS, signal.SIGKILL), 1, "error: Ray's control process (GCS) at ", "ray"),
    Fault("ray-gcs-killed-then-resumed", process(GCS, signal.SIGKILL), 0, "Ray's control process", "ray",
          changes=RESTARTED),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slurm.yaml").write_text('time: "00:10:00"\nnodelist: "node[1-4]"\n')
    monkeypatch.setenv("PUZZLE_SLURM", str(tmp_path / "slurm.yaml"))
    with cleared(tmp_path):
        yield tmp_path


def cases() -> list[Any]:
    slurm = [pytest.mark.long, pytest.mark.slurm]
    return [pytest.param(f, id=f.name, marks=slurm if f.launcher == "slurm" else slurm[:1]) for f in FAULTS]


@pytest.mark.parametrize("fault", cases())
def test_a_fault_ends_as_it_should(folder: Path, fault: Fault) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(config(iterations=ITERATIONS, **fault.changes)))
    words = ("train", "--config", "run.yaml", "--out", "out", "--launcher", fault.launcher)
    with small_disk(folder / "out") if fault.strike is fill else contextlib.nullcontext():
        check(folder, fault, words)


def check(folder: Path, fault: Fault, words: Sequence[str]) -> None:
    run = puzzle(folder, *words)
    wait_for(lambda: (folder / "out/checkpoints/state-3").exists() or run.poll() is not None)
    assert run.poll() is None, console(folder)
    before = len(metrics(folder / "out"))
    if fault.again:
        run.send_signal(signal.SIGTERM)
        run.wait(PATIENCE)
        fault.strike(folder)
        run = puzzle(folder, *words, "--resume")
    else:
        fault.strike(folder)
    struck = time.monotonic()
    assert run.wait(PATIENCE) == fault.code, console(folder)
    if fault.code:
        assert time.monotonic() - struck < PATIENCE / 2
        wait_for(lambda: not of_test(folder))
    assert re.search(fault.words.replace("(", r"\(").replace(")", r"\)"), console(folder)), console(folder)
    if fault.code == 0:
        assert len(metrics(folder / "out")) == ITERATIONS
    elif (folder / "out/run.jsonl").exists():
        assert len(metrics(folder / "out")) >= before  # nothing that was done is lost
