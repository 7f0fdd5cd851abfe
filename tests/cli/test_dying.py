"""Runs that are killed at random moments end as if left alone; runs that hang end and say why."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puzzle.runlog import load_runs

ROOT = Path(__file__).parents[2]
CONFIG = """\
batch: 4
device: cpu
layout: {dp: 2}
actor:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
         num_attention_heads: 4, max_position_embeddings: 64}
  optimizer: {lr: 1.0e-3, schedule: cosine, warmup: 2}
reward: {function: "puzzle.rlhf.rewards:letter_share"}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 20}
generation: {max_new_tokens: 6}
algorithm: {minibatch: 2, reward_norm: true, kl: {target: 0.1}}
checkpoint: {every: 1, keep: 2}
log: {provenance: rehearsal, variant: tiny, tensorboard: false, plots: false}
"""
WORLD = 2
PATIENCE = 120.0
"""Seconds for a step forward on a machine that does other things."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    words = ("soup", "film", "sea", "long road", "dog", "end", "tea")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "The {word} was"}}\n' for word in words))
    return tmp_path


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[str]:
    """`puzzle train` as the leader of a process group of its own."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(
        [sys.executable, "-m", "puzzle.cli", "train", "--config", "run.yaml", "--out", out, *options],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def members(leader: int) -> dict[int, int]:
    """Process id -> parent's id of all living processes of a process group."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            letter, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and letter not in "ZX":
            found[int(stat.parent.name)] = int(parent)
    return found


def workers(leader: int) -> list[int]:
    """The ranks: children of the leader's child that forks them."""
    found = members(leader)
    return sorted(pid for pid, parent in found.items() if found.get(parent) == leader)


def gone(run: subprocess.Popen[str], seconds: float = 30.0) -> bool:
    """Whether all processes of the group end by themselves."""
    until = time.monotonic() + seconds
    while members(run.pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not members(run.pid)


def end(run: subprocess.Popen[str]) -> None:
    """Nothing of the run lives on."""
    for pid in members(run.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert gone(run)


def said(run: subprocess.Popen[str]) -> str:
    """All that the run says on stderr, when it has ended."""
    assert run.stderr is not None
    return run.stderr.read()


def checkpoint(out: Path) -> int:
    """The number of the newest complete checkpoint."""
    numbers = (re.fullmatch(r"state-(\d+)", path.name) for path in (out / "checkpoints").glob("state-*"))
    return max((int(match[1]) for match in numbers if match), default=0)


def reach(run: subprocess.Popen[str], out: Path, number: int) -> bool:
    """Wait for a checkpoint; False if the run is over before."""
    until = time.monotonic() + PATIENCE
    while checkpoint(out) < number or len(workers(run.pid)) < WORLD:
        if run.poll() is not None:
            return False
        assert time.monotonic() < until, f"no checkpoint {number}"
        time.sleep(0.002)
    return True


def weights(out: Path) -> dict[str, torch.Tensor]:
    folders = [out / "checkpoints" / name for name in ("last", "last-critic")]
    return {
        f"{folder.name} {name}": tensor
        for folder in folders
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def kill_often(folder: Path, out: Path, kills: int, options: list[str]) -> tuple[int, int]:
    """Kill a rank or the whole group at random moments, and go on; how many ranks, how many groups died.

    One command survives the deaths of its ranks by `launch.max_restarts`; after that of a group another
    command goes on with `--resume`.
    """
    dice = random.Random(kills)
    ranks = groups = 0
    run = start(folder, out.name, *options)
    try:
        for _ in range(kills):
            before = checkpoint(out)
            if not reach(run, out, before + dice.randint(1, 2)):
                raise AssertionError(f"the run was over after {ranks + groups} kills: {said(run)}")
            time.sleep(dice.uniform(0.0, 0.3))
            if dice.random() < 0.3:
                os.killpg(run.pid, signal.SIGKILL)
                end(run)
                groups += 1
                run = start(folder, out.name, *options, "--resume")
                continue
            victims = workers(run.pid)
            os.kill(dice.choice(victims), signal.SIGKILL)
            ranks += 1
            until = time.monotonic() + PATIENCE
            while set(victims) & set(workers(run.pid)):
                assert time.monotonic() < until
                time.sleep(0.01)
        code = run.wait(timeout=300)
        assert code == 0, said(run)
        assert gone(run)
    finally:
        end(run)
    return ranks, groups


def test_a_stopped_rank_is_named_and_the_run_goes_on(folder: Path) -> None:
    """SIGSTOP in the middle of an iteration: one line, stacks, no process left, then a restart."""
    layout = ["--layout.dp", "1", "--layout.pp", "2", "--iterations", "16"]
    options = [*layout, "--launch.watchdog", "4", "--launch.max_restarts", "1"]
    run = start(folder, "out", *options)
    try:
        assert reach(run, folder / "out", 1)
        stopped = time.monotonic()
        victim = workers(run.pid)[1]
        os.kill(victim, signal.SIGSTOP)
        while victim in workers(run.pid):
            assert time.monotonic() - stopped < 60
            time.sleep(0.05)
        lines = said(run).splitlines()
        assert run.wait(timeout=PATIENCE) == 0, lines
        assert gone(run)
    finally:
        end(run)
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
    for rank in range(WORLD):
        assert "most recent call first" in (folder / f"out/ranks/rank-00{rank}.txt").read_text()
    records = [json.loads(line) for line in (folder / "out/run.jsonl").read_text().splitlines()]
    (resume,) = (record for record in records if record["record"] == "resume")
    assert resume["iteration"] >= 1
    assert any(r["record"] == "warning" and r["text"].startswith("restart 1 of 1 after: ") for r in records)
    assert records[-1]["status"] == "completed"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_kills_change_nothing(folder: Path, kills: int) -> None:
    options = ["--iterations", str(8 * kills), "--launch.max_restarts", str(kills)]
    alone = start(folder, "alone", *options)
    try:
        ranks, groups = kill_often(folder, folder / "killed", kills, options)
        assert alone.wait(timeout=600) == 0, said(alone)
    finally:
        end(alone)
    ours, theirs = weights(folder / "killed"), weights(folder / "alone")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left, again = load_runs(folder / "alone").runs[0], load_runs(folder / "killed").runs[0]
    assert [i.metrics for i in again.iterations] == [i.metrics for i in left.iterations]
    records = [json.loads(line) for line in (folder / "killed/run.jsonl").read_text().splitlines()]
    notes = [r["text"] for r in records if r["record"] == "warning" and r["text"].startswith("restart ")]
    assert len(notes) <= ranks
    assert all(re.match(r"restart \d+ of \d+ after: rank \d on \S+: ", note) for note in notes)
    assert ranks + groups == kills
    assert records[-1]["status"] == "completed"
