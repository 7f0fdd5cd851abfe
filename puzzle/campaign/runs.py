"""Run many experiments one after another, each in its own folder and process, and draw them.

OUT/campaign.json       what was asked, how each run ended and after how many seconds, whether all is done
OUT/logs/NAME/          one run: config.json, console.log, what `puzzle train` writes, and `done` at the end
OUT/                    pictures, CSVs and table
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from puzzle.campaign.experiments import Experiment
from puzzle.config.capabilities import BASELINE, BASELINE_SCRIPT
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError, describe
from puzzle.files import durable
from puzzle.files.jsonio import read_object
from puzzle.files.path import ROOT
from puzzle.launch import Launcher

RECORD = "campaign.json"
LAST_LINES = 5
END_SECONDS = 45.0  # which a launcher needs at most to end what it started
UNDONE, FINISHED = ("failed", "later"), ("done", "kept")
LONGER = 1.5  # times the seconds after which a run was ended, until more is known
Command = Callable[[Path, Path], list[str]]  # from configuration file and folder of a run


@dataclass(frozen=True)
class Outcome:
    """How one experiment ended: `status` is done, kept (done before), failed, absent (not possible here) or
    later (the time was used up); `seconds` are those of the run, 0 where it did not run."""

    experiment: Experiment
    status: str
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Budget:
    """Seconds for a piece of a campaign from `began` on (a monotonic clock's). No run starts that is not
    expected to end in time, but the shortest where none is: a piece brings a campaign on. At the end of the
    time a run that still goes is ended."""

    seconds: float
    began: float
    expected: Callable[[Experiment, Mapping[str, float]], float]  # with the seconds of runs that have ended

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def first(self, waiting: Sequence[Experiment], took: Mapping[str, float], new: bool) -> Experiment | None:
        """The first that is expected to end in time; in a `new` piece the shortest at least."""
        expected = {one.name: self.expected(one, took) for one in waiting}
        fitting = [one for one in waiting if expected[one.name] <= self.left]
        if fitting or not new:
            return fitting[0] if fitting else None
        return min(waiting, key=lambda one: expected[one.name])


def command_of(experiment: Experiment, launcher: Launcher, packages: Path | None = None) -> Command:
    """What runs an experiment's variant: `puzzle train`, or the baseline's program, which finds `packages`
    before any others."""
    program, before = ["-P", "-m", "puzzle.cli", "train"], []
    if experiment.config.log.variant == BASELINE:
        program = [str(ROOT / BASELINE_SCRIPT)]
        if packages is not None:
            others = os.environ.get("PYTHONPATH")
            path = os.pathsep.join([os.path.abspath(packages), *([others] if others else [])])
            before = ["env", f"PYTHONPATH={path}"]

    def command(config: Path, folder: Path) -> list[str]:
        files = ["--config", str(config), "--out", str(folder)]
        return [*before, sys.executable, *program, *files, "--launcher", launcher, *experiment.options]

    return command


def digest(config: TrainConfig) -> str:
    """Changes with anything that the configuration says."""
    text = json.dumps(config.resolved(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finished(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` holds the finished run of `config`; UserError if it holds another finished run."""
    mark = folder / "done"
    if not mark.exists():
        return False
    if mark.read_text().strip() != digest(config):
        raise UserError(f"{folder}: a finished run of another configuration; choose another --out")
    return True


def run_all(
    experiments: Sequence[Experiment],
    out: Path,
    console: Console,
    command: Callable[[Experiment], Command],
    keep: int | None = None,
    budget: Budget | None = None,
    ended: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run what is not finished in `out`, by the `command` for each, as far as the `budget` goes; after a
    failure the next one goes on. `ended` hears after each run how all stand.

    Runs keep the file descriptor `keep` open while they live.
    """
    outcomes = [Outcome(e, "absent", why="; ".join(e.lacks)) for e in experiments if e.lacks]
    possible = [e for e in experiments if not e.lacks]
    known = recorded(out)
    took = {name: run.least_seconds for name, run in known.items() if run.least_seconds}
    kept = [e for e in possible if finished(out / "logs" / e.name, e.config)]
    outcomes += [Outcome(e, "kept") for e in kept]
    waiting = [e for e in possible if e not in kept]
    waiting.sort(key=lambda e: e.name in known and known[e.name].status == "failed")  # once more, at the end
    total = len(waiting)
    began = time.monotonic()
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        while waiting:
            number = total - len(waiting)
            one = waiting[0] if budget is None else budget.first(waiting, took, new=number == 0)
            if one is None:
                break
            waiting.remove(one)
            outcome = _tried(one, out, command(one), keep, budget)
            outcomes.append(outcome)
            if outcome.status == "done":
                took[one.name] = outcome.seconds
            bar.update(task, completed=number + 1)
            rest = (time.monotonic() - began) / (number + 1) * len(waiting)
            how = f"{outcome.status}, {outcome.seconds:.1f} s{': ' * bool(outcome.why)}{outcome.why}"
            left = f"; about {rest:.0f} s left" if waiting else ""
            line = f"[{number + 1}/{total}] {one.label}: {how}{left}"
            console.print(line, markup=False, soft_wrap=True)
            ended([*outcomes, *(Outcome(e, "later") for e in waiting)])
    return [*outcomes, *(Outcome(e, "later") for e in waiting)]


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()


def _tried(
    experiment: Experiment, out: Path, command: Command, keep: int | None, budget: Budget | None
) -> Outcome:
    try:
        return _run_one(experiment, out / "logs" / experiment.name, command, keep, budget)
    except OSError as error:  # a full disk, say
        return Outcome(experiment, "failed", why=describe(error))


def _run_one(
    experiment: Experiment, folder: Path, command: Command, keep: int | None, budget: Budget | None
) -> Outcome:
    if folder.exists():
        shutil.rmtree(folder)  # of an earlier try: it has no `done`
    folder.mkdir(parents=True)
    config = folder / "config.json"
    config.write_text(json.dumps(experiment.config.resolved(), indent=1) + "\n")
    console = folder / "console.log"
    began = time.monotonic()
    with console.open("wb") as log:
        kept = () if keep is None else (keep,)
        run = subprocess.Popen(command(config, folder), stdout=log, stderr=subprocess.STDOUT, pass_fds=kept)
        code = _wait(run, None if budget is None else max(0.0, budget.left))
    seconds = time.monotonic() - began
    if code is None:
        return Outcome(experiment, "later", seconds, "ended, the time was used up")
    if code == 0:
        durable.write_text(folder / "done", digest(experiment.config) + "\n")
        return Outcome(experiment, "done", seconds)
    lines = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
    cause = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no output"]
    return Outcome(experiment, "failed", seconds, f"exit code {code}: {cause[-1]}")


def _wait(process: subprocess.Popen, limit: float | None) -> int | None:
    """The exit code, None if it took more than `limit` seconds; whatever interrupts this process, and the end
    of that time, ends the run."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_lines(outcome: Outcome, out: Path) -> list[str]:
    """The end of a failed run's output."""
    log = out / "logs" / outcome.experiment.name / "console.log"
    return log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []


@dataclass(frozen=True)
class Recorded:
    """What campaign.json says of a run; `seconds` are those of its last try, 0 without any."""

    status: str
    seconds: float
    why: str

    @property
    def least_seconds(self) -> float:
        """What the run takes at least: more than it had when its time was used up; 0 if nothing is known."""
        return self.seconds * {"done": 1.0, "kept": 1.0, "later": LONGER}.get(self.status, 0.0)


def record(out: Path, asked: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    """Write campaign.json: what was asked for and how each run ended. Runs of which nothing new is said keep
    their seconds."""
    complete = bool(outcomes) and all(outcome.status not in UNDONE for outcome in outcomes)
    known = recorded(out)
    runs = {name: asdict(run) for name, run in known.items()}
    for outcome in outcomes:
        name = outcome.experiment.name
        seconds = outcome.seconds or (known[name].seconds if name in known else 0.0)
        told: dict[str, object] = {"status": outcome.status, "seconds": round(seconds, 1), "why": outcome.why}
        if outcome.status == "failed":
            told["log"] = "\n".join(last_lines(outcome, out))
        runs[name] = told
    text = json.dumps({"asked": asked, "complete": complete, "runs": runs}, indent=1)
    durable.write_text(out / RECORD, text + "\n")


def recorded(out: Path) -> dict[str, Recorded]:
    """What campaign.json in `out` says of runs, by name; nothing where there is none."""
    try:
        runs = read_object(out / RECORD).get("runs")
    except UserError:
        return {}
    told = (
        {name: run for name, run in runs.items() if isinstance(run, dict)} if isinstance(runs, dict) else {}
    )
    return {
        name: Recorded(str(run.get("status")), float(run.get("seconds") or 0), str(run.get("why")))
        for name, run in told.items()
    }


def unfinished(parent: Path, asked: dict[str, object]) -> Path | None:
    """The newest folder in `parent` of a campaign that asked for the same and did not complete."""
    for folder in sorted(parent.glob("outputs_from_exec_*"), reverse=True):
        try:
            found = read_object(folder / RECORD)
        except UserError:
            continue
        if found.get("asked") == asked and not found.get("complete"):
            return folder
    return None
