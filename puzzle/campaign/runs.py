"""Run many experiments one after another, each in its own folder and process, and draw them.

OUT/campaign.json       what was asked, and whether all of it is done
OUT/logs/NAME/          one run: config.json, console.log, what `puzzle train` writes, and `done` at the end
OUT/                    pictures, CSVs and table
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
Command = Callable[[Path, Path], list[str]]  # from configuration file and folder of a run
# As the published runs: everything sharded, both trained models checkpointed, the reference on the host; the
# Hybrid Engine where it engages (the log says if it does not). Micro-batches and greedy: experiments.yaml.
BASELINE_OPTIONS = (
    *("--actor_zero_stage", "3", "--critic_zero_stage", "3", "--enable_hybrid_engine"),
    *("--actor_gradient_checkpointing", "--critic_gradient_checkpointing", "--offload_reference_model"),
)


@dataclass(frozen=True)
class Outcome:
    """How one experiment ended: `status` is done, kept (done before), failed or absent (not possible yet)."""

    experiment: Experiment
    status: str
    seconds: float = 0.0
    why: str = ""


def command_of(experiment: Experiment, launcher: Launcher) -> Command:
    """What runs an experiment's variant: `puzzle train`, or the baseline's program."""
    program, options = ["-P", "-m", "puzzle.cli", "train"], ()
    if experiment.config.log.variant == BASELINE:
        program, options = [str(ROOT / BASELINE_SCRIPT)], BASELINE_OPTIONS

    def command(config: Path, folder: Path) -> list[str]:
        files = ["--config", str(config), "--out", str(folder)]
        return [sys.executable, *program, *files, "--launcher", launcher, *options]

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
) -> list[Outcome]:
    """Run what is not finished in `out`, by the `command` for each; after a failure the next one goes on.

    Runs keep the file descriptor `keep` open while they live.
    """
    outcomes = [Outcome(e, "absent", why="; ".join(e.lacks)) for e in experiments if e.lacks]
    possible = [e for e in experiments if not e.lacks]
    kept = [e for e in possible if finished(out / "logs" / e.name, e.config)]
    outcomes += [Outcome(e, "kept") for e in kept]
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    waiting = [e for e in possible if e not in kept]
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(waiting))
        for number, experiment in enumerate(waiting, 1):
            try:
                outcome = _run_one(experiment, out / "logs" / experiment.name, command(experiment), keep)
            except OSError as error:  # a full disk, say
                outcome = Outcome(experiment, "failed", why=describe(error))
            outcomes.append(outcome)
            bar.update(task, completed=number)
            rest = (time.monotonic() - began) / number * (len(waiting) - number)
            how = f"{outcome.status}, {outcome.seconds:.1f} s{': ' * bool(outcome.why)}{outcome.why}"
            left = f"; about {rest:.0f} s left" if number < len(waiting) else ""
            line = f"[{number}/{len(waiting)}] {experiment.label}: {how}{left}"
            console.print(line, markup=False, soft_wrap=True)
    return outcomes


def _run_one(experiment: Experiment, folder: Path, command: Command, keep: int | None) -> Outcome:
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
        code = _wait(run)
    seconds = time.monotonic() - began
    if code == 0:
        durable.write_text(folder / "done", digest(experiment.config) + "\n")
        return Outcome(experiment, "done", seconds)
    lines = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
    cause = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no output"]
    return Outcome(experiment, "failed", seconds, f"exit code {code}: {cause[-1]}")


def _wait(process: subprocess.Popen) -> int:
    """The exit code; whatever interrupts this process ends the run with it."""
    try:
        return process.wait()
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


def record(out: Path, asked: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    """Write campaign.json: what was asked for and how each run ended."""
    complete = bool(outcomes) and all(outcome.status != "failed" for outcome in outcomes)
    runs = {o.experiment.name: {"status": o.status, "why": o.why} for o in outcomes}
    for outcome in outcomes:
        if outcome.status == "failed":
            runs[outcome.experiment.name]["log"] = "\n".join(last_lines(outcome, out))
    text = json.dumps({"asked": asked, "complete": complete, "runs": runs}, indent=1)
    durable.write_text(out / RECORD, text + "\n")


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
