"""`puzzle train`: check what can be checked without a device, then start the processes of the run."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from puzzle.cli import Parser
from puzzle.config import TrainConfig
from puzzle.configio import load_config, option_help
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.sources import check


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
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for all that the run writes")
    parser.add_argument("--dry-run", action="store_true", help="check, print the whole configuration, stop")
    options, overrides = parser.parse_known_args(arguments)
    if options.help:
        print(parser.format_help() + "\n" + option_help())
        return 0
    config = load_config(options.config, overrides)
    check(config)
    if options.dry_run:
        print(json.dumps(config.resolved(), indent=2))
        return 0
    if options.out is None:
        raise UserError("--out DIR is missing: the folder for the log, samples and checkpoints")
    return start(config, options.out)


def start(config: TrainConfig, out: Path) -> int:
    """Run `config` into `out`; a folder of our making does not outlive a refusal before the log began."""
    rank, _ = local.identity()
    made = rank == 0 and not out.exists()
    if rank == 0:
        _prepare(out)
    try:
        local.run("puzzle.rlhf.trainer:train", (config, out), config.world, out / "ranks")
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except UserError:
        if made and not (out / "run.jsonl").exists():
            shutil.rmtree(out)
        raise
    if rank == 0 and config.log.plots:
        _plot(out)
    return 0


def _plot(out: Path) -> None:
    """Draw the curves of the finished run into out/plots."""
    from plotting import curves
    from plotting.loading import load
    from plotting.output import whole

    with whole(out / "plots") as folder:
        curves.write(load([out]).runs, folder)


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, not a folder")
    if (out / "run.jsonl").exists():
        raise UserError(f"--out {out}: already holds a run; choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written")
