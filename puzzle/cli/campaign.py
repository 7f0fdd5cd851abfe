"""`puzzle campaign`: run the experiments of the paper's figures at some scale, then draw them."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from puzzle.cli import Parser
from puzzle.errors import UserError
from puzzle.experiments import TABLE, Experiment, Request, expand, read_table
from puzzle.launch import campaign
from puzzle.launch.local import terminate_as_exit
from puzzle.sources import check


def run(arguments: Sequence[str]) -> int:
    """Run the command; 0 when nothing failed, 1 when a run failed."""
    parser = Parser("puzzle campaign", description="Run the experiments, then draw them.", allow_abbrev=False)
    parser.add_argument("--scale", help="cpu, node or paper; default: what this machine can run")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="FIGURE", help="e.g. figure9"
    )
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each, with other seeds")
    parser.add_argument("--cluster", default="local", metavar="NAME", help="what figures call this machine")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the unfinished one, or a new one")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what cannot run yet")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help=f"default: {TABLE.name}")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: at least 1")
    console = Console(highlight=False)
    gpus = gpu_count()
    scale = options.scale or ("node" if gpus else "cpu")
    console.print(f"this machine has {gpus or 'no'} GPUs; scale {scale}")
    devices = gpus if scale == "node" and gpus else None
    request = Request(scale, tuple(options.only), options.cluster, devices, options.repeats)
    experiments = [_checked(experiment) for experiment in expand(read_table(options.table), request)]
    if options.dry_run:
        return _list(experiments, console)
    if scale != "cpu" and not gpus:
        raise UserError(f"--scale {scale} needs GPUs and this machine has none; use --scale cpu")
    if all(experiment.lacks for experiment in experiments):
        _list(experiments, console)
        raise UserError("none of these runs can be run by this version")
    asked = {**asdict(request), "only": list(request.only)}
    out = options.out or campaign.unfinished(Path(), asked)
    if out is None:
        out = Path(f"outputs_from_exec_{datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"into {out} (start again to go on there: finished runs are kept)", soft_wrap=True)
    campaign.record(out, asked, [])
    with terminate_as_exit():
        outcomes = campaign.run_all(experiments, out, console)
    campaign.record(out, asked, outcomes)
    return _summary(outcomes, out, console)


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver lists; 0 without a driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _checked(experiment: Experiment) -> Experiment:
    """With what the models and layouts refuse among what it lacks."""
    if experiment.lacks:
        return experiment
    try:
        check(experiment.config)
    except UserError as error:
        return replace(experiment, lacks=(str(error),))
    return experiment


def _list(experiments: Sequence[Experiment], console: Console) -> int:
    for experiment in experiments:
        figures = ",".join(experiment.config.log.figures)
        state = "lacks " + "; ".join(experiment.lacks) if experiment.lacks else "can run"
        line = f"{experiment.label}, {experiment.config.world} processes [{figures}]: {state}"
        console.print(line, markup=False, soft_wrap=True)
    able = sum(not experiment.lacks for experiment in experiments)
    console.print(f"{len(experiments)} runs, {able} can run")
    return 0


def _summary(outcomes: Sequence[campaign.Outcome], out: Path, console: Console) -> int:
    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for outcome in outcomes:
        if outcome.status == "absent":
            say(f"not run: {outcome.experiment.label}: lacks {outcome.why}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        say(f"failed: {outcome.experiment.label}: {outcome.why}")
        for line in campaign.last_lines(outcome, out):
            say(f"    {line}")
    drawn = _draw(outcomes, out)
    counts = Counter(outcome.status for outcome in outcomes)
    words = {"done": "run", "kept": "kept from before", "failed": "failed", "absent": "not possible yet"}
    say(", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status]))
    return 1 if failed or not drawn else 0


def _draw(outcomes: Sequence[campaign.Outcome], out: Path) -> bool:
    """Draw the figures of the finished runs; False if there are none, or if that failed."""
    finished = [o.experiment for o in outcomes if o.status in ("done", "kept")]
    figures = sorted({figure for experiment in finished for figure in experiment.config.log.figures})
    if not figures:
        return False
    logs = [word for e in finished for word in ("--logs", str(out / "logs" / e.name))]
    command = [sys.executable, "-m", "plotting", *logs, "--out", str(out / "figures"), "--only", *figures]
    return subprocess.run(command, check=False).returncode == 0
