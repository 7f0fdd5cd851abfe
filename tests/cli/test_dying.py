"""Runs that are killed at random moments end as if left alone; runs that hang end and say why."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.killing import (
    SETUPS,
    Outcome,
    Victim,
    files,
    metrics,
    schedule,
    short_folder,
    undisturbed,
    written,
)
from tests.helpers import PATIENCE
from tests.launch.running import cleared, console, puzzle, ranks, wait_for

KILLS = 17
SHORT = ("dp 2", "re-sharded", "one process")
PER_KILL = 8
"""Iterations of a run for each of its kills, so that it lives long enough for all of them."""


def test_a_stopped_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGSTOP in the middle of an iteration: one line, stacks, no process left, then a restart."""
    options = [*written(tmp_path, 16), *SETUPS["pp 2"].options.split()]
    watched = ["--launch.watchdog", "4", "--launch.max_restarts", "1"]
    with cleared(tmp_path):
        run = puzzle(tmp_path, "train", *options, *watched, "--out", "out")
        state = tmp_path / "out/checkpoints/state-1"
        wait_for(lambda: state.exists() and len(ranks(tmp_path)) == 2, run)
        victim = ranks(tmp_path)[1]
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: victim not in ranks(tmp_path))
        assert run.wait(timeout=PATIENCE) == 0, console(tmp_path)
    lines = console(tmp_path).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    # Ranks start in order, but processes need not have ascending ids.
    hung = re.match(
        r"error: rank ([01]) on \S+ is stopped \(SIGSTOP, .*no sign of life for \d+ s, last in ", errors[0]
    )
    assert hung, errors
    other = 1 - int(hung[1])
    assert re.search(rf"; rank {other} on \S+ waits in .*(from|to|over) .*{hung[1]}", errors[0]), errors
    assert errors[0].endswith("; stacks: out/ranks")
    for rank in range(2):
        assert "most recent call first" in (tmp_path / f"out/ranks/rank-00{rank}.txt").read_text()
    records = [json.loads(line) for line in (tmp_path / "out/run.jsonl").read_text().splitlines()]
    (resume,) = (record for record in records if record["record"] == "resume")
    assert resume["iteration"] >= 1
    assert any(r["record"] == "warning" and r["text"].startswith("restart 1 of 1 after: ") for r in records)
    assert records[-1]["status"] == "completed"


def kill_often(folder: Path, name: str, kills: int, seed: int) -> Outcome:
    """Run a set-up in `folder`, kill it as the seed says, and go on until it ends well."""
    with cleared(folder), short_folder() as scratch:
        victim = Victim(folder, scratch, SETUPS[name], kills, PER_KILL * kills)
        for kill in schedule(SETUPS[name], seed, kills):
            victim.kill(kill)
        return victim.finish()


Begin = Callable[[str, int, int], tuple[Path, Future[Outcome]]]


@pytest.fixture(scope="module")
def begin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Begin]:
    """Begins to kill a set-up: those of one kill all at once, two at a time, for they wait more than they
    compute; the others one by one."""
    chosen = {item.name for item in request.session.items}
    names = [name for name in SETUPS if f"test_kills_change_nothing[{name}-1]" in chosen]
    begun: dict[tuple[str, int], tuple[Path, Future[Outcome]]] = {}
    with ThreadPoolExecutor(2) as pool:

        def start(name: str, kills: int, seed: int) -> tuple[Path, Future[Outcome]]:
            for other in names if kills == 1 else [name]:
                if (other, kills) not in begun:
                    folder = tmp_path_factory.mktemp("run")
                    begun[other, kills] = folder, pool.submit(kill_often, folder, other, kills, seed)
            return begun[name, kills]

        yield start


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        *((name, 1) if name in SHORT else pytest.param(name, 1, marks=pytest.mark.long) for name in SETUPS),
        *(pytest.param(name, KILLS, marks=pytest.mark.long) for name in SETUPS),
    ],
)
def test_kills_change_nothing(name: str, kills: int, begin: Begin) -> None:
    """Weights, optimizers and all that a state holds, exported models, samples and the log's metrics have
    the bits of an undisturbed run; no process, temporary file or lock is left, nothing half-written.

    KILL_SEED repeats a schedule.
    """
    seed = int(os.environ.get("KILL_SEED") or (1 if kills == 1 else random.SystemRandom().randrange(10**6)))
    folder, killed = begin(name, kills, seed)
    undisturbed(folder, SETUPS[name], PER_KILL * kills)
    outcome = killed.result()
    ours, theirs = files(folder / "killed"), files(folder / "alone")
    other = [file for file in sorted(ours.keys() | theirs.keys()) if ours.get(file) != theirs.get(file)]
    same = not other and metrics(folder / "killed") == metrics(folder / "alone")
    print(
        f"\n{name}: seed {seed}, {outcome.live} of {kills} kills hit a live run ({outcome.told()}),"
        f" {outcome.commands} commands; same bits: {same}; left behind: {len(outcome.left)}"
    )
    assert same, other
    assert not outcome.left
    assert not any("Traceback" in line for line in outcome.said), outcome.said
    assert outcome.live > kills // 2
    records = [json.loads(line) for line in (folder / "killed/run.jsonl").read_text().splitlines()]
    assert records[-1]["status"] == "completed"
    notes = [r["text"] for r in records if r["record"] == "warning" and r["text"].startswith("restart ")]
    assert len(notes) <= outcome.live
    cause = r"rank \d on \S+: (its fork server was )?killed by SIGKILL"
    assert all(re.match(rf"restart \d+ of \d+ after: {cause}", note) for note in notes), notes
