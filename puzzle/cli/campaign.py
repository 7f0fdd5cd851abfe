"""`puzzle campaign`: run the experiments of the paper's figures at some scale, then draw them."""

import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from puzzle import footprint
from puzzle.capabilities import BASELINE
from puzzle.cli import Parser
from puzzle.errors import UserError
from puzzle.experiments import TABLE, Experiment, Request, expand, read_table
from puzzle.launch import LAUNCHERS, Launcher, campaign, slurm
from puzzle.launch.local import terminate_as_exit
from puzzle.launch.machine import Machine, find_machine
from puzzle.resolve import check_files, check_packages, resolve


def run(arguments: Sequence[str]) -> int:
    """Run the command; 0 when nothing failed, 1 when a run failed."""
    options = _parsed(arguments)
    console = Console(highlight=False)
    machine = find_machine(options.launcher)
    if options.device_memory is not None:
        total = None if options.dry_run else machine.total  # as if there were as many devices as asked for
        machine = replace(machine, memory=footprint.parse_bytes(options.device_memory), total=total)
    scale = options.scale or ("node" if machine.per_host else "cpu")
    console.print(f"{machine.words}; scale {scale}, launcher {options.launcher}", soft_wrap=True)
    table = read_table(options.table)
    devices = None
    if scale == "node" and scale in table.scales:
        devices = min(machine.per_host, table.scales[scale].devices) or table.scales[scale].devices
    request = Request(
        scale, tuple(options.only), options.cluster, devices, options.repeats, options.iterations
    )
    if (most := table.most_layers(scale, devices)) is not None:  # said wherever a figure names the machine
        cluster = f"{request.cluster}, {devices} GPUs, at most {most} layers"
        request = replace(request, cluster=cluster)
    experiments = [_checked(experiment, machine) for experiment in expand(table, request)]
    if options.dry_run:
        return _list(experiments, console)
    if experiments[0].config.device == "cuda" and not machine.per_host:
        raise UserError(f"--scale {scale} needs GPUs, and {machine.words}; use --scale cpu")
    if all(experiment.lacks for experiment in experiments):
        _list(experiments, console)
        raise UserError("none of these runs can be run by this version here")
    asked = {**asdict(request), "only": list(request.only)}
    out = options.out or campaign.unfinished(Path(), asked)
    if out is None:
        out = Path(f"outputs_from_exec_{datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"into {out} (start again to go on there: finished runs are kept)", soft_wrap=True)
    campaign.record(out, asked, [])
    if options.launcher == "slurm" and not slurm.inside():
        command = [sys.executable, "-m", "puzzle.cli", "campaign", *arguments, "--out", str(out)]
        return slurm.submit(command, _largest(experiments), out)
    with terminate_as_exit(), _launcher(options.launcher, experiments):
        outcomes = campaign.run_all(
            experiments, out, console, lambda one: campaign.command_of(one, options.launcher)
        )
    campaign.record(out, asked, outcomes)
    return _summary(outcomes, out, console)


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = Parser("puzzle campaign", description="Run the experiments, then draw them.", allow_abbrev=False)
    parser.add_argument("--scale", help="cpu, node, paper or rehearsal; default: what this machine can run")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="who starts the processes")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="FIGURE", help="e.g. figure9"
    )
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each, with other seeds")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each run, the first warming up")
    parser.add_argument("--cluster", default="local", metavar="NAME", help="what figures call this machine")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the unfinished one, or a new one")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what cannot run yet")
    parser.add_argument("--device-memory", metavar="SIZE", help="refuse what does not fit, such as 80GB")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help=f"default: {TABLE.name}")
    options = parser.parse_args(arguments)
    for name, least in (("repeats", 1), ("iterations", 2)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise UserError(f"--{name} {given}: at least {least}")
    return options


def _largest(experiments: Sequence[Experiment]) -> int:
    """Processes of the largest run that can be run."""
    return max(experiment.config.world for experiment in experiments if not experiment.lacks)


def _launcher(launcher: Launcher, experiments: Sequence[Experiment]) -> AbstractContextManager[None]:
    """What lives as long as the campaign: one Ray for all of its runs."""
    if launcher != "ray":
        return nullcontext()
    from puzzle.launch.ray import cluster

    return cluster(_largest(experiments), experiments[0].config.device)


def _checked(experiment: Experiment, machine: Machine) -> Experiment:
    """With what the models, the layouts and the machine refuse among what it lacks."""
    if experiment.lacks:
        return experiment
    config = experiment.config
    try:
        check_packages(config)
        plan = resolve(config)
        check_files(config)
        if config.device == "cuda" and machine.total is not None and config.world > machine.total:
            raise UserError(f"{config.world} GPUs where there are {machine.total}")
        if config.device == "cuda" and machine.memory is not None and config.log.variant != BASELINE:
            footprint.require(footprint.estimate(plan, fused=True), machine.memory)
    except UserError as error:
        return replace(experiment, lacks=(str(error),))
    return experiment


def _list(experiments: Sequence[Experiment], console: Console) -> int:
    for experiment in experiments:
        figures = ",".join(experiment.config.log.figures)
        state = "lacks " + "; ".join(experiment.lacks) if experiment.lacks else "can run"
        modelled = experiment.config.device == "cuda" and experiment.config.log.variant != BASELINE
        if modelled and not experiment.lacks:
            most = max(footprint.estimate(resolve(experiment.config), fused=True), key=lambda rank: rank.peak)
            state += f", needs {most.peak / footprint.GIB:.1f} GiB in {most.worst}"
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
