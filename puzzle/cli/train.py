"""`puzzle train`: check what can be checked without a device, then start the processes of the run."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puzzle import footprint
from puzzle.capabilities import BASELINE, BASELINE_SCRIPT, require_device
from puzzle.cli import Parser, named
from puzzle.config import TrainConfig
from puzzle.configio import Key, build, load_config, merge, option_help, parse_overrides
from puzzle.errors import UserError
from puzzle.launch import LAUNCHERS, Launcher, launch, local, slurm
from puzzle.resolve import check_files, check_packages, resolve
from puzzle.runlog import load_runs

FRUITLESS = 2


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(
        "puzzle train",
        description="Train a model by PPO.",
        epilog="Every key of the configuration is an option, --section.key VALUE, and wins over the file.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and every key")
    parser.add_argument("--config", type=named, metavar="FILE", help="YAML file")
    parser.add_argument("--out", type=named, metavar="DIR", help="folder for all that the run writes")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out DIR")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="who starts the processes")
    parser.add_argument("--dry-run", action="store_true", help="check, print configuration and memory, stop")
    parser.add_argument("--profile", metavar="N,...", help="short for --log.profile: iterations to profile")
    parser.add_argument("--device-memory", metavar="SIZE", help="refuse what does not fit, such as 80GB")
    options, overrides = parser.parse_known_args(arguments)
    if options.help:
        print(parser.format_help() + "\n" + option_help())
        return 0
    memory = None if options.device_memory is None else footprint.parse_bytes(options.device_memory)
    if options.profile is not None:
        overrides += ["--log.profile", options.profile]
    if options.resume and options.config is None:
        config = _configured(options.out, overrides)
    else:
        config = load_config(options.config, overrides)
    if config.log.variant == BASELINE:
        raise UserError(f"log.variant {BASELINE} is another program's: run {BASELINE_SCRIPT}")
    check_packages(config)
    plan = resolve(config)
    if options.dry_run or config.world > 1:  # a single process reads its files at once
        check_files(config)
    if options.dry_run or memory is not None:
        ranks = footprint.estimate(plan, fused=config.device != "cpu")
    if options.dry_run:
        print(json.dumps(config.resolved(), indent=2))
        print(plan.table(), file=sys.stderr)
        print(footprint.table(ranks), file=sys.stderr)
    if memory is not None:
        footprint.require(ranks, memory)
    if options.dry_run:
        return 0
    if options.out is None:
        raise UserError("--out DIR is missing: the folder for the log, samples and checkpoints")
    require_device(config.device)
    if options.launcher == "slurm" and not slurm.inside():
        command = [sys.executable, "-m", "puzzle.cli", "train", *arguments]
        return slurm.submit(command, config.world, options.out)
    return start(config, options.out, options.resume, options.launcher)


def _configured(out: Path | None, overrides: Sequence[str]) -> TrainConfig:
    """The configuration of the run in `out`, as its log has it, below the command line."""
    if out is None:
        raise UserError("--resume needs --out DIR: the folder of the run that goes on")
    log = out / "run.jsonl"
    runs = load_runs(log).runs if log.is_file() else []
    if not runs:
        raise UserError(f"--resume: {out} holds no run; without --resume one begins")
    config = {name: value for name, value in runs[0].config.items() if name != "global_batch_size"}

    def place(key: Key) -> str:
        return f"{log} and the command line"

    return build(merge(config, parse_overrides(overrides)), place)


def start(config: TrainConfig, out: Path, resume: bool = False, launcher: Launcher = "local") -> int:
    """Run `config` into `out`; if it dies, resume it, `launch.max_restarts` times at most, but not again
    after FRUITLESS restarts in a row without a new checkpoint.

    A folder of our making does not outlive a refusal before the log began.
    """
    rank, _ = local.identity()
    made = rank == 0 and not out.exists()
    if rank == 0:
        _prepare(out, resume)
    most = config.launch.max_restarts
    if most and "RANK" in os.environ:
        raise UserError("launch.max_restarts: another launcher started this process and restarts it: use 0")
    target, logs, note = "puzzle.cli.train:process", out / "ranks", ""
    reached, fruitless = -1, 0
    for restarts in range(most + 1):
        args = (config.resolved(), str(out.resolve()), resume, note)
        try:
            if launcher == "local":
                local.run(target, args, config.world, logs, apart=most > 0)
            else:
                launch(launcher, target, args, config.world, logs, config.device)
        except local.WorkerError as error:
            before, reached = reached, _newest_checkpoint(out)
            fruitless = fruitless + 1 if reached == before else 0
            ends = fruitless == FRUITLESS and restarts < most
            why = f"; given up: {FRUITLESS} restarts brought no new checkpoint" if ends else ""
            print(f"error: {error}{why}", file=sys.stderr)
            if ends or restarts == most:
                return error.code
            note = f"restart {restarts + 1} of {most} after: {error}"
            resume = (out / "run.jsonl").exists()
        except UserError:
            if made and not (out / "run.jsonl").exists():
                shutil.rmtree(out)
            raise
        else:
            break
    return 0


def _newest_checkpoint(out: Path) -> int:
    found = (path.name.removeprefix("state-") for path in (out / "checkpoints").glob("state-*"))
    return max((int(number) for number in found if number.isdigit()), default=0)


def process(resolved: dict[str, Any], out: str, resume: bool, note: str) -> None:
    """One process of the run; its arguments are JSON values, which any launcher can bring to any host."""
    from puzzle.rlhf.trainer import train

    train(TrainConfig.model_validate(resolved), Path(out), resume, note)


def _prepare(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, not a folder")
    if resume and not (out / "run.jsonl").exists():
        raise UserError(f"--resume: {out} holds no run; without --resume one begins")
    if not resume and (out / "run.jsonl").exists():
        raise UserError(f"--out {out}: already holds a run; choose another folder, or go on with --resume")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written")
