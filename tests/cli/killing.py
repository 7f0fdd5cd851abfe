"""Runs whose processes are killed at random moments, and the undisturbed ones that they must equal."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from puzzle.cli import train
from puzzle.runlog import load_runs
from tests.helpers import PATIENCE
from tests.launch.running import console, of_test, puzzle, ranks, wait_for

CONFIG = """\
batch: 4
device: cpu
layout: {dp: 2}
actor:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
         num_attention_heads: 4, max_position_embeddings: 64}
  optimizer: {lr: 1.0e-3, schedule: cosine, warmup: 2}
reward: {function: "puzzle.rlhf.rewards:letter_share"}
data: {prompts: PROMPTS, tokenizer: bytes, max_prompt_tokens: 20}
generation: {max_new_tokens: 6}
algorithm: {minibatch: 2, reward_norm: true}
checkpoint: {every: 1, keep: 2}
log: {provenance: rehearsal, variant: tiny, plots: false}
"""
SERVER = "multiprocessing.forkserver"


@dataclass(frozen=True)
class Setup:
    """Options of a run of `world` processes, and who is killed where one kill has to do."""

    options: str
    victim: str = "rank"
    world: int = 2


SETUPS = {
    "dp 2": Setup("--algorithm.kl.target 0.1"),
    "pp 2": Setup("--layout.dp 1 --layout.pp 2", "fork server"),
    "tp 2, GRPO": Setup("--layout.dp 1 --layout.tp 2 --algorithm.name grpo --generation.samples 2"),
    "one process": Setup("--layout.dp 1", "launcher", 1),
    "re-sharded": Setup("--layout.dp 1 --layout.pp 2 --generation.layout.tp 2 --generation.layout.pp 1"),
    "fused": Setup("--layout.dp 1 --layout.pp 2 --intra.fuse_training true --intra.fuse_inference true"),
}
VICTIMS = ("rank", "rank", "rank", "launcher", "fork server", "all")


@dataclass(frozen=True)
class Kill:
    """Once there are so many more checkpoints, `seconds` later SIGKILL for a rank (a share of them tells
    which), the launcher, the fork server, or all of the command's processes."""

    victim: str
    which: float
    checkpoints: int
    seconds: float


def schedule(setup: Setup, seed: int, count: int) -> list[Kill]:
    """`count` kills; a third of them hit a run that begins or goes on, before its first checkpoint."""
    dice = random.Random(seed)
    kills = []
    for _ in range(count):
        victim = setup.victim if count == 1 else dice.choice(VICTIMS)
        victim = "launcher" if setup.world == 1 else victim  # which is the rank
        checkpoints = dice.choice((0, 1, 2)) if count > 1 else 1
        kills.append(Kill(victim, dice.random(), checkpoints, dice.uniform(0.0, 0.3 if checkpoints else 3.0)))
    return kills


@dataclass
class Outcome:
    """What came of a set-up's kills: how many hit a run that lived, and what was left behind."""

    live: int = 0
    victims: list[str] = field(default_factory=list)
    commands: int = 0
    left: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def told(self) -> str:
        """How many of which victims."""
        return ", ".join(f"{count} {victim}" for victim, count in Counter(self.victims).items())


def written(folder: Path, iterations: int) -> list[str]:
    """The run's files and options in `folder`."""
    words = ("soup", "film", "sea", "long road", "dog", "end", "tea")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "The {word} was"}}\n' for word in words))
    (folder / "run.yaml").write_text(CONFIG.replace("PROMPTS", str(prompts)))
    return ["--config", str(folder / "run.yaml"), "--iterations", str(iterations)]


@contextlib.contextmanager
def short_folder() -> Generator[Path]:
    """For temporary files of the commands: so short that sockets could be there."""
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        yield Path(folder)


def undisturbed(folder: Path, setup: Setup, iterations: int) -> None:
    """The run as folder/alone, of processes that this one has forked."""
    told = [*written(folder, iterations), *setup.options.split(), "--launch.max_restarts", "1"]
    assert train.run([*told, "--out", str(folder / "alone")]) == 0


class Victim:
    """A command that is killed again and again in `folder`/killed, with temporary files in `scratch`."""

    def __init__(self, folder: Path, scratch: Path, setup: Setup, kills: int, iterations: int) -> None:
        self.folder, self.scratch, self.setup = folder, scratch, setup
        self.out = folder / "killed"
        restarts = ["--launch.max_restarts", str(kills)] if setup.world > 1 else []
        self.options = [*written(folder, iterations), *setup.options.split(), *restarts]
        self.outcome = Outcome()
        self.command = self._start()

    def _start(self) -> subprocess.Popen[str]:
        self.outcome.commands += 1
        go_on = ["--resume"] if (self.out / "run.jsonl").exists() else []
        words = ["train", *self.options, "--out", str(self.out), *go_on]
        # torch's cache stays under its name, as its documentation says: it is not of this run.
        cache = str(self.folder / "inductor")
        return puzzle(self.folder, *words, TMPDIR=str(self.scratch), TORCHINDUCTOR_CACHE_DIR=cache)

    @property
    def over(self) -> bool:
        """Whether the command has ended."""
        return self.command.poll() is not None

    def checkpoint(self) -> int:
        """The number of the newest complete checkpoint."""
        found = (self.out / "checkpoints").glob("state-*")
        numbers = (re.fullmatch(r"state-(\d+)", path.name) for path in found)
        return max((int(match[1]) for match in numbers if match), default=0)

    def _pids(self, victim: str) -> list[int]:
        """Who can be killed as `victim`; none before all of them are there."""
        there = of_test(self.folder)
        if victim == "rank":
            found = ranks(self.folder)
            return found if len(found) == self.setup.world else []
        if victim == "fork server":
            children = ranks(self.folder)
            return [pid for pid, line in there.items() if SERVER in line and pid not in children]
        return [self.command.pid] if victim == "launcher" else list(there)

    def _met(self, kill: Kill) -> list[int]:
        """Wait for the moment; who is killed then, or nobody where the command is over."""
        target = self.checkpoint() + kill.checkpoints
        self._until(lambda: self.checkpoint() >= target)
        if kill.checkpoints:
            self._until(lambda: bool(self._pids("rank")) or self.setup.world == 1)
        time.sleep(kill.seconds)
        self._until(lambda: bool(self._pids(kill.victim)))
        pids = self._pids(kill.victim)
        if kill.victim == "rank" and pids:
            pids = [pids[int(kill.which * len(pids))]]
        return [] if self.over else pids

    def kill(self, kill: Kill) -> None:
        """Wait for the moment, kill; where that ended the command, see what is left and start another."""
        pids = self._met(kill)
        while self.over and self.command.returncode != 0:  # by the kill before, some time after its ranks
            self._start_again()
            pids = self._met(kill)
        if not pids:
            return
        before = ranks(self.folder)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.outcome.live += 1
        self.outcome.victims.append(kill.victim)
        if kill.victim in ("launcher", "all"):
            self.command.wait(PATIENCE)
        self._until(lambda: not set(before) & set(ranks(self.folder)))
        if self.over:
            self._start_again()

    def _start_again(self) -> None:
        self.look()
        self.command = self._start()

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition, or until the command is over."""
        wait_for(lambda: self.over or condition())

    def look(self) -> None:
        """Note what the command said, and processes and temporary files that outlive it."""
        self.outcome.said += console(self.folder).splitlines()
        if self.command.returncode >= 0:  # of itself: nothing is left when it returns
            self.outcome.left += of_test(self.folder).values()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not of_test(self.folder))
        self.outcome.left += of_test(self.folder).values()
        self.outcome.left += [str(path) for path in self.scratch.iterdir()]

    def finish(self) -> Outcome:
        """Let the run end, start it as often as it takes; the outcome."""
        while self.command.wait(PATIENCE) != 0:
            assert self.outcome.commands < 100, console(self.folder)
            self._start_again()
        self.look()
        return self.outcome


def files(run: Path) -> dict[str, bytes]:
    """What a run has left, by name: models, states with their optimizers and all that the next iteration
    depends on, samples (once each); no log, which tells times and kills, and no output of ranks."""
    found = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith(("run.", "ranks/")):
            found[name] = path.read_bytes()
    found["samples.jsonl"] = b"\n".join(sorted(set(found["samples.jsonl"].splitlines())))
    return found


def metrics(run: Path) -> Sequence[object]:
    """Iterations and metrics of a run's log; of one that was run again, the later ones."""
    return [(iteration.iteration, dict(iteration.metrics)) for iteration in load_runs(run).runs[0].iterations]
