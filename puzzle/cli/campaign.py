"""`puzzle campaign`: run the experiments of the paper's figures at some scale, then draw them."""

import math
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from puzzle.campaign import runs as campaign
from puzzle.campaign.experiments import TABLE, Experiment, Selection, Table, expand, read_table
from puzzle.campaign.forecast import GPU_START_SECONDS, Expectation, baseline_bytes, forecast, told_hours
from puzzle.campaign.machine import Machine, find_machine
from puzzle.cli import Parser, campaign_logs, filled, named, real, whole
from puzzle.cli.workloads import workload_of
from puzzle.config import memory_report as footprint
from puzzle.config.capabilities import BASELINE, NO_CUDA, OTHER_TORCH, has_cpu_torch
from puzzle.config.resolve import RunPlan, resolve
from puzzle.errors import UserError, lacking, terminate_as_exit
from puzzle.files import lock
from puzzle.launch import LAUNCHERS, Launcher, slurm
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.iteration import predict
from puzzle.rlhf.requirements import check_files, check_packages

MOST_REPEATS = 1000
FEW = 3
"""Failed runs whose last lines are printed."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; 0 when nothing failed, 1 when a run failed."""
    options = _parsed(arguments)
    console = Console(highlight=False)
    machine = find_machine(options.launcher)
    if options.device_memory is not None:
        total = None if options.dry_run else machine.total  # as if there were as many devices as asked for
        machine = replace(machine, memory=footprint.parse_bytes(options.device_memory), total=total)
    if options.baseline_packages is not None and not options.baseline_packages.is_dir():
        raise UserError(f"--baseline-packages {options.baseline_packages}: no such folder")
    table = read_table(options.table)
    selection = _selection(options, machine, table)
    scale = selection.scale
    console.print(f"{machine.words}; scale {scale}, launcher {options.launcher}", soft_wrap=True)
    experiments = [_checked(experiment, machine) for experiment in expand(table, selection)]
    submits = options.launcher == "slurm" and not slurm.inside()
    if options.dry_run:
        _list(experiments, console)
        out = options.out or Path("outputs_from_exec_<time>")
        words = _submitted(arguments, out)
        submission = slurm.ahead(words, _largest(experiments), out) if submits else []
        _ahead(experiments, console, submission, options.calibration, options.minutes)
        return 0
    if find_spec("matplotlib") is None:
        raise UserError(f"what the runs measure is drawn: {lacking('matplotlib')}")
    _require_devices(scale, experiments, machine, options.launcher)
    if all(experiment.lacks for experiment in experiments):
        _list(experiments, console)
        raise UserError("none of these runs can be run by this version here")
    asked = {**asdict(selection), "only": list(selection.only)}
    budget = _budget(options.minutes, experiments)
    out = options.out or campaign.unfinished(Path(), asked)
    if out is None:
        out = Path(f"outputs_from_exec_{datetime.now():%Y%m%d-%H%M%S}")
    if submits:  # the job makes the folder its own
        return slurm.submit(_submitted(arguments, out), _largest(experiments), out)
    with lock.hold(out) as keep:
        console.print(f"into {out} (start again to go on there: finished runs are kept)", soft_wrap=True)
        campaign.record(out, asked, [])
        with terminate_as_exit(), _launcher(options.launcher, experiments):
            outcomes = campaign.run_all(
                experiments,
                out,
                console,
                lambda one: campaign.command_of(one, options.launcher, options.baseline_packages),
                keep,
                budget,
                lambda so_far: campaign.record(out, asked, so_far),
            )
        campaign.record(out, asked, outcomes)
        if options.ship is not None:
            campaign_logs.ship(outcomes, out, options.ship)
        return _summary(outcomes, out, console)


def _selection(options: Namespace, machine: Machine, table: Table) -> Selection:
    """What was asked for, on what there is."""
    single = min(machine.per_host, options.devices or machine.per_host) == 1
    scale = options.scale or ("cpu" if not machine.per_host else "gpu" if single else "node")
    known = table.scales.get(scale)
    devices = memory = None
    if known is not None and known.fit:
        most = options.devices or machine.per_host or known.devices
        devices, memory = min(most, known.devices), machine.memory
    cluster = options.cluster or ("local" if devices is None else machine.name(devices))
    return Selection(
        scale, tuple(options.only), cluster, devices, memory, options.repeats, options.iterations
    )


def _budget(minutes: float | None, experiments: Sequence[Experiment]) -> campaign.Budget | None:
    if minutes is None:
        return None

    def expected(experiment: Experiment, took: Mapping[str, float]) -> float:
        return Expectation(experiments, took)(experiment)

    return campaign.Budget(60 * minutes, time.monotonic(), expected)


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = Parser("puzzle campaign", description="Run the experiments, then draw them.", allow_abbrev=False)
    parser.add_argument(
        "--scale", help="cpu, gpu, node, paper or rehearsal; default: what this machine can run"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="who starts the processes")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="FIGURE", help="e.g. figure9"
    )
    parser.add_argument(
        "--repeats",
        type=whole(1, MOST_REPEATS),
        default=1,
        metavar="N",
        help="runs of each, with other seeds",
    )
    parser.add_argument("--iterations", type=whole(2), metavar="N", help="of each run, the first warming up")
    parser.add_argument("--cluster", type=filled, metavar="NAME", help="what figures call this machine")
    parser.add_argument("--out", type=named, metavar="DIR", help="default: the unfinished one, or a new one")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what cannot run yet")
    parser.add_argument(
        "--minutes",
        type=real(0),
        metavar="M",
        help="start no run that would not end in time; started again, the command goes on",
    )
    parser.add_argument("--devices", type=whole(1), metavar="N", help="use so many GPUs of this host")
    parser.add_argument("--device-memory", metavar="SIZE", help="refuse what does not fit, such as 80GB")
    parser.add_argument(
        "--baseline-packages",
        type=named,
        metavar="DIR",
        help="Python packages that DeepSpeed-Chat finds first, such as its transformers 4.35.2",
    )
    parser.add_argument(
        "--ship",
        type=named,
        metavar="DIR",
        help="also write the logs that figures read, and no more, into DIR",
    )
    parser.add_argument(
        "--calibration", metavar="C", help="with --dry-run: predict hours by it, as `puzzle plan predict`"
    )
    parser.add_argument("--table", type=named, default=TABLE, metavar="FILE", help=f"default: {TABLE.name}")
    return parser.parse_args(arguments)


def _submitted(arguments: Sequence[str], out: Path) -> list[str]:
    """What a job runs for this command."""
    given = [word for word in arguments if word != "--dry-run"]
    return [sys.executable, "-P", "-m", "puzzle.cli", "campaign", *given, "--out", str(out)]


def _require_devices(
    scale: str, experiments: Sequence[Experiment], machine: Machine, launcher: Launcher
) -> None:
    """Raise UserError where runs on GPUs can have none, here or wherever the launcher leads."""
    if experiments[0].config.device != "cuda":
        return
    if not machine.per_host:
        remedy = "use --scale cpu"
        if launcher == "slurm":
            remedy = f"say in {slurm.file()} which gres a node has, as gpu:8"
        elif launcher == "local" and slurm.is_here() and not slurm.inside():
            remedy = "use --launcher slurm, which asks Slurm for nodes with them, or --scale cpu"
        raise UserError(f"--scale {scale} needs GPUs, and {machine.words}; {remedy}")
    if has_cpu_torch():
        raise UserError(f"--scale {scale}: {OTHER_TORCH}")


def _fits(experiment: Experiment) -> bool:
    """Whether nothing is in the way of a run but the build of torch."""
    return experiment.lacks in ((), (NO_CUDA,))


def _largest(experiments: Sequence[Experiment]) -> int:
    """Processes of the largest run that can be run (of all, if none can)."""
    able = [experiment for experiment in experiments if _fits(experiment)] or experiments
    return max(experiment.config.world for experiment in able)


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
        if config.device == "cuda" and machine.memory is not None:
            _require_memory(experiment, plan, machine.memory)
    except UserError as error:
        return replace(experiment, lacks=(str(error),))
    if config.device == "cuda" and has_cpu_torch():
        return replace(experiment, lacks=(NO_CUDA,))
    return experiment


def _require_memory(experiment: Experiment, plan: RunPlan, memory: int) -> None:
    """Raise UserError where a run does not fit: by the report, or by the least that DeepSpeed needs."""
    if experiment.config.log.variant != BASELINE:
        footprint.require(footprint.estimate(plan, True, memory), memory)
        return
    stage = int(experiment.options[experiment.options.index("--actor_zero_stage") + 1])
    needs = baseline_bytes(experiment.config, stage)
    if needs > memory:
        raise UserError(
            f"DeepSpeed's models alone need {needs / footprint.GIB:.1f} GiB of a device under ZeRO-{stage},"
            f" it has {memory / footprint.GIB:.1f}"
        )


def _list(experiments: Sequence[Experiment], console: Console) -> None:
    for experiment in experiments:
        figures = ",".join(experiment.config.log.figures)
        state = "lacks " + "; ".join(experiment.lacks) if experiment.lacks else "can run"
        modelled = experiment.config.device == "cuda" and experiment.config.log.variant != BASELINE
        if modelled and _fits(experiment):
            most = max(footprint.estimate(resolve(experiment.config), fused=True), key=lambda rank: rank.peak)
            state += f", needs {most.peak / footprint.GIB:.1f} GiB in {most.worst}"
        line = f"{experiment.label}, {experiment.config.world} processes [{figures}]: {state}"
        console.print(line, markup=False, soft_wrap=True)
    able = sum(not experiment.lacks for experiment in experiments)
    console.print(f"{len(experiments)} runs, {able} can run; in brackets layouts as tp,pp,dp", markup=False)


def _ahead(
    experiments: Sequence[Experiment],
    console: Console,
    submission: Sequence[str],
    calibration: str | None,
    minutes: float | None,
) -> None:
    """Say what the campaign would ask for and take: the job, time and disk."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    able = [experiment for experiment in experiments if _fits(experiment)]
    if any(NO_CUDA in experiment.lacks for experiment in experiments):
        say(f"{NO_CUDA}: {OTHER_TORCH}")
    for line in submission:
        say(line)
    if able:
        how = (
            "the start of its processes"
            if able[0].config.device == "cpu"
            else "the speed of the published runs"
        )
        say(f"estimated, by {how}: {forecast(able)}")
        if minutes is not None:
            pieces = math.ceil(forecast(able).seconds / (60 * minutes))
            say(f"in pieces of {minutes:g} minutes: about {pieces}, fewer where devices are faster")
        if able[0].config.device == "cuda":
            say(_predicted(able, calibration))


def _predicted(experiments: Sequence[Experiment], name: str | None) -> str:
    """Hours by the planner, which knows layouts; of its own engine's runs alone."""
    if name is None:
        return (
            "predicted: not without --calibration C (a file of `puzzle bench calibrate`, or a name as h200)"
        )
    calibration = read_calibration(name)
    ours = [one for one in experiments if one.config.log.variant != BASELINE]
    seconds = sum(
        GPU_START_SECONDS
        + one.config.iterations * predict(workload_of(resolve(one.config)), calibration.costs).total
        for one in ours
    )
    spread = f" (+-{calibration.spread:.0%})" if calibration.spread else ""
    found = f"predicted, by {name} for {calibration.device}: {told_hours(seconds)}{spread}"
    others = len(experiments) - len(ours)
    return f"{found} for {len(ours)} runs" + (f", without {others} of the baseline" if others else "")


def _summary(outcomes: Sequence[campaign.Outcome], out: Path, console: Console) -> int:
    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    absent = [outcome for outcome in outcomes if outcome.status == "absent"]
    for why, number in Counter(outcome.why for outcome in absent).items():
        first = next(outcome.experiment.label for outcome in absent if outcome.why == why)
        more = f" and {number - 1} more" if number > 1 else ""
        say(f"not run: {first}{more}: lacks {why}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed[:FEW]:
        say(f"failed: {outcome.experiment.label}: {outcome.why}")
        for line in campaign.last_lines(outcome, out):
            say(f"    {line}")
    if rest := failed[FEW:]:
        say(f"failed: {len(rest)} more, told in {out / campaign.RECORD}")
    counts = Counter(outcome.status for outcome in outcomes)
    words = {"done": "run", "kept": "kept from before", "failed": "failed", "absent": "not possible here"}
    words["later"] = "left: start again to go on"
    said = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
    say(f"{len(outcomes)} runs: {said}")
    drawn = _draw(outcomes, out)
    return 1 if failed or not drawn else 0


def _draw(outcomes: Sequence[campaign.Outcome], out: Path) -> bool:
    """Draw the figures of the finished runs, with gaps for the others; False if there are none, or if that
    failed."""
    finished = [o.experiment for o in outcomes if o.status in campaign.FINISHED]
    figures = sorted({figure for experiment in finished for figure in experiment.config.log.figures})
    if not figures:
        return False
    with TemporaryDirectory() as logs:
        campaign_logs.ship(outcomes, out, Path(logs))
        drawing = ["--logs", logs, "--out", str(out), "--only", *figures]
        command = [sys.executable, "-P", "-m", "puzzle.plotting", *drawing]
        return subprocess.run(command, check=False).returncode == 0
