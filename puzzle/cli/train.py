"""`puzzle train`: check what can be checked without a device, then start the processes of the run."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from puzzle.capabilities import missing
from puzzle.cli import Parser
from puzzle.config import ROLES, TrainConfig
from puzzle.configio import load_config, option_help
from puzzle.errors import UserError
from puzzle.launch import local


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


def check(config: TrainConfig) -> None:
    """Raise UserError for what is wrong before any process starts: files, folders, absent features."""
    lacks = missing(config)
    if lacks:
        raise UserError(f"this version has no {', nor '.join(lacks)}")
    for role in ROLES:
        section = getattr(config, role)
        if section.model is not None and not (role == "reference" and config.ppo.reference_free):
            _check_folder(f"{role}.model", Path(section.model))
    for key in ("prompts", "eval_prompts"):
        path = getattr(config.data, key)
        if path is not None and not Path(path).exists():
            raise UserError(f"data.{key}: {path}: no such file")


def _check_folder(key: str, folder: Path) -> None:
    if not folder.is_dir():
        kind = "is a file, not a model folder" if folder.exists() else "no such folder"
        hint = "; puzzle convert makes a folder of it" if folder.suffix == ".gguf" else ""
        raise UserError(f"{key}: {folder}: {kind}{hint}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{key}: {folder} has no config.json; it is not a Hugging Face model folder")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {file} is not valid JSON: {error}") from None


def start(config: TrainConfig, out: Path) -> int:
    """Run `config` into `out`; an empty `out` of our making does not outlive a refusal."""
    rank, _ = local.identity()
    if rank == 0:
        _prepare(out)
    try:
        local.run("puzzle.rlhf.trainer:train", (config, out), config.world, out / "ranks")
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except UserError:
        if rank == 0 and not any(out.iterdir()):
            out.rmdir()
        raise
    return 0


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, not a folder")
    if (out / "run.jsonl").exists():
        raise UserError(f"--out {out}: already holds a run; choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot be written")
