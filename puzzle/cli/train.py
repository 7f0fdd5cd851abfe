"""`puzzle train` and its kin: check what can be checked without a device, then start the processes of the
run."""

import base64
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from puzzle.campaign.forecast import told_hours
from puzzle.cli import Parser, completion, layouts, named
from puzzle.config import memory_report as footprint
from puzzle.config.base import RunConfig
from puzzle.config.capabilities import BASELINE, BASELINE_SCRIPT, require_device
from puzzle.config.load import Given, go_on, keys, load_config, option_help, read_given, without_inherited
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.data import hub
from puzzle.engine.runtime.identity import launched
from puzzle.errors import UserError
from puzzle.files import durable, lock
from puzzle.launch import LAUNCHERS, Launcher, launch, local, slurm
from puzzle.plan.predict.calibration import read_calibration
from puzzle.rlhf.requirements import check_files, check_packages
from puzzle.rlhf.rewards.weighted import pickled_function, runs_users_code
from puzzle.runlog import folders
from puzzle.runlog.past import Past, past_of, read_lines

FRUITLESS = 2


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Train a model by reinforcement learning (PPO, GRPO, ...)."
    return command("train", about, TrainConfig, arguments)


def command(name: str, about: str, schema: type[RunConfig], arguments: Sequence[str]) -> int:
    """`puzzle NAME`, a run that `schema` describes; returns the exit code."""
    parser = _parser(name, about, schema is TrainConfig)
    if completion.asked():
        for key, is_section in keys(schema):
            if not is_section:
                parser.add_argument(f"--{'.'.join(key)}")
        completion.offer(parser)
    options, overrides = parser.parse_known_args(arguments)
    if options.help:
        print(parser.format_help() + "\n" + option_help(schema))
        return 0
    memory = None if options.device_memory is None else footprint.parse_bytes(options.device_memory)
    if options.profile is not None:
        overrides += ["--log.profile", options.profile]
    planned: Mapping[str, Any] = {}
    if options.plan is not None:
        planned = _planned(options.plan, options.config, overrides, options.calibration, memory)
    elif options.calibration is not None:
        raise UserError("--calibration: only --plan auto rests on one")
    if options.resume and options.config is None:
        sources = _before(schema, options.out, overrides)
    else:
        sources = read_given(schema, options.config, overrides)
    sources = sources.over(f"plan {options.plan}", planned)
    config, given = sources.build(schema), sources.values
    if config.log.variant == BASELINE:
        raise UserError(f"log.variant {BASELINE} is another program's: run {BASELINE_SCRIPT}")
    check_packages(config)
    config, given = hub.localised(config, given, weights=not options.dry_run)
    plan = resolve(config, given=given)
    # A single process reads its files at once, and so do those of another launcher.
    if options.dry_run or (config.world > 1 and "RANK" not in os.environ):
        check_files(config)
    if options.dry_run or memory is not None:
        ranks = footprint.estimate(plan, config.device != "cpu", memory)
    shown = sys.stdout
    if options.dry_run == "json":
        print(json.dumps(config.resolved(), indent=2))
        shown = sys.stderr
    if options.dry_run:
        print(plan.table(), footprint.table(ranks), sep="\n", file=shown)
    submits = options.launcher == "slurm" and not slurm.inside()
    again = [sys.executable, "-P", "-m", "puzzle.cli", name, *_without_dry_run(arguments)]
    if options.dry_run and submits:
        lines = slurm.ahead(again, config.world, options.out or Path("OUT"))
        print("\n".join(lines), file=shown)
    if memory is not None:
        footprint.require(ranks, memory)
    if options.dry_run:
        return 0
    if options.out is None:
        raise UserError("--out DIR is missing: the folder for the log, samples and checkpoints")
    require_device(config.device)
    if submits:
        return slurm.submit(again, config.world, options.out)
    return start(config, options.out, options.resume, options.launcher, given)


def _parser(name: str, about: str, plans: bool) -> Parser:
    """The options that are no keys of the configuration; `plans`: searched plans among them."""
    parser = Parser(
        f"puzzle {name}",
        description=about,
        epilog="Every key of the configuration is an option, --section.key VALUE, and wins over the file.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and every key")
    parser.add_argument("--config", type=named, metavar="FILE", help="YAML file")
    parser.add_argument("--out", type=named, metavar="DIR", help="folder for all that the run writes")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out DIR")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="who starts the processes")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        choices=("text", "json"),
        const="text",
        help="check, print the plan and the memory of every rank, stop; json: the configuration as it"
        " resolves on standard output, the plan on standard error",
    )
    parser.add_argument("--profile", metavar="N,...", help="short for --log.profile: iterations to profile")
    parser.set_defaults(plan=None, calibration=None)
    if plans:
        parser.add_argument(
            "--plan",
            metavar="auto|FILE",
            help="layouts and options of `puzzle plan search`: found now for as many devices, or its file",
        )
        parser.add_argument("--calibration", metavar="C", help="what --plan auto rests on; default: h200")
    parser.add_argument("--device-memory", metavar="SIZE", help="refuse what does not fit, such as 80GB")
    return parser


def _without_dry_run(arguments: Sequence[str]) -> list[str]:
    """The command line of the run itself."""
    words = list(arguments)
    for place in [i for i, word in enumerate(words) if word == "--dry-run"][::-1]:
        del words[place : place + 1 + (words[place + 1 : place + 2] in (["text"], ["json"]))]
    return [word for word in words if not word.startswith("--dry-run=")]


def _planned(
    plan: str, file: Path | None, overrides: Sequence[str], calibration: str | None, memory: int | None
) -> layouts.Options:
    """The options of a plan; what is taken is said."""
    if plan != "auto":
        taken, where = layouts.read_plan(Path(plan)), plan
    elif file is None:
        raise UserError("--plan auto needs --config FILE: what is to be laid out")
    else:
        name = calibration or layouts.DEFAULT
        found = read_calibration(name)
        if memory is not None:
            found = dataclasses.replace(found, memory_bytes=memory)
        config = load_config(file, overrides)
        per_node = config.switch.gpus_per_node or min(8, config.world)
        ranking = layouts.rank_plans(file, overrides, config.world, per_node, found, layouts.TOP)
        best = ranking.plans[ranking.taken]
        taken = best.options
        hours = told_hours(best.seconds.total * config.iterations)
        where = f"{name} predicts {best.seconds.total:.2f} s an iteration, {hours} in all"
    said = ", ".join(f"{key} {json.dumps(value)}" for key, value in taken.items())
    print(f"plan ({where}): {said}", file=sys.stderr)
    return taken


def _before(schema: type[RunConfig], out: Path | None, overrides: Sequence[str]) -> Given:
    """The configuration of the run in `out`, as it was given at last, below the command line."""
    if out is None:
        raise UserError("--resume needs --out DIR: the folder of the run that goes on")
    past = _past(out)
    _same_task(past, schema.task_name(), out)
    before = past.given
    if before is None:
        whole = {name: value for name, value in past.config.items() if name != "global_batch_size"}
        before = without_inherited(whole)
    return go_on(schema, before, out / "run.jsonl", overrides)


def _past(out: Path) -> Past:
    """What the run in `out` was; UserError if there is none."""
    past = past_of(read_lines(out / "run.jsonl"))
    if past is None:
        raise UserError(f"--resume: {out} holds no run; without --resume one begins")
    return past


def _same_task(past: Past, task: str, out: Path) -> None:
    """UserError unless the run of `past` is one of this command."""
    before = past.config.get("task", TrainConfig.task_name())
    if before != task:
        raise UserError(f"--resume: {out} holds a run of puzzle {before}, not of puzzle {task}")


def start(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    launcher: Launcher = "local",
    given: Mapping[str, Any] | None = None,
    reward: Callable[..., Any] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Run `config`, of which the user gave `given`, into `out`, which no other command may write meanwhile.
    `reward` is the callable that the configuration calls `given`. With `meanwhile` (launcher local) the run
    lives in processes of its own, and that is called again and again while they run; what it raises ends it.

    A folder of our making does not outlive a refusal before the log began.
    """
    place = launched()
    if config.launch.max_restarts and place is not None:
        raise UserError("launch.max_restarts: another launcher started this process and restarts it: use 0")
    made = not os.path.lexists(out)
    began = datetime.now().astimezone()
    if resume:
        past = _past(out)
        _same_task(past, config.task_name(), out)
        began = _began(past, out) or began
    moment = began.isoformat(timespec="seconds")
    told = (config.resolved(), None if given is None else dict(given), str(out.resolve()), moment)
    sent: Any = reward
    apart = meanwhile is not None or _apart(config)
    if reward is not None and (launcher != "local" or config.world > 1 or apart):
        sent = base64.b64encode(pickled_function(reward)).decode()
    if place is not None and place.rank > 0:
        return _attempts(config, out, resume, launcher, told, sent, None, meanwhile)
    folders.check(out)
    with lock.hold(out) as keep:
        try:
            folders.prepare(out, resume, config.checkpoint.save)
            return _attempts(config, out, resume, launcher, told, sent, keep, meanwhile)
        except UserError:
            if made and not (out / "run.jsonl").exists():
                shutil.rmtree(out)
            raise


def _began(past: Past, out: Path) -> datetime | None:
    """When a run began, None where its log does not say it."""
    said = past.run.started
    try:
        return None if said is None else datetime.fromisoformat(said)
    except ValueError:
        raise UserError(f"{out / 'run.jsonl'}: started {said!r} is no time; write ISO 8601") from None


def _apart(config: RunConfig) -> bool:
    """Whether a run of one process shall live apart from this one: a user's code can end its process without
    a word, and who restarts it must outlive it."""
    return config.launch.max_restarts > 0 or (isinstance(config, TrainConfig) and runs_users_code(config))


def _attempts(
    config: RunConfig,
    out: Path,
    resume: bool,
    launcher: Launcher,
    told: tuple[Any, ...],
    reward: Any,
    keep: int | None,
    meanwhile: Callable[[], None] | None,
) -> int:
    """Run it; if it dies, resume it, `launch.max_restarts` times at most, but not again after FRUITLESS
    restarts in a row without a new checkpoint. `told` are the first arguments of `rlhf.process`, `reward` is
    its last one."""
    target, logs, note = "puzzle.rlhf.process:process", out / "ranks", ""
    most = config.launch.max_restarts
    reached, fruitless = -1, 0
    for restarts in range(most + 1):
        args = (*told, resume, note, reward)
        try:
            if launcher == "local":
                apart = meanwhile is not None or _apart(config)
                local.run(target, args, config.world, logs, apart=apart, keep=keep, meanwhile=meanwhile)
            else:
                launch(launcher, target, args, config.world, logs, config.device, keep)
        except local.WorkerError as error:
            before, reached = reached, max(folders.states(out / "checkpoints"), default=0)
            fruitless = fruitless + 1 if reached == before else 0
            ends = fruitless == FRUITLESS and restarts < most
            why = f"; given up: {FRUITLESS} restarts brought no new checkpoint" if ends else ""
            print(f"error: {error}{why}", file=sys.stderr)
            if ends or restarts == most:
                return error.code
            note = f"restart {restarts + 1} of {most} after: {error}"
            resume = (out / "run.jsonl").exists()
            durable.settle(out / "checkpoints")
        else:
            break
    return 0
