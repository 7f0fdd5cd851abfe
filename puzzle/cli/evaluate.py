"""`puzzle evaluate`: score a model's answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puzzle.cli import Parser, named, whole
from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.load import option_help, read_given, validated
from puzzle.config.sources import layout_of, spec_of
from puzzle.data import hub
from puzzle.errors import UserError
from puzzle.files.limits import MOST_SEQUENCES
from puzzle.launch import local


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(
        "puzzle evaluate",
        usage="puzzle evaluate MODEL --prompts FILE [options]",
        description="Score the answers of MODEL, a Hugging Face model folder (actor.model), to prompts.",
        epilog="Every key of the configuration is an option, --section.key VALUE, and wins over the file.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and every key")
    parser.add_argument("--config", type=named, metavar="FILE", help="YAML file")
    parser.add_argument("--prompts", type=named, metavar="FILE", help="short for --data.prompts")
    parser.add_argument("--reward", metavar="WHAT", help="a model folder, or module:name of a function")
    parser.add_argument("--samples", type=whole(1, MOST_SEQUENCES), help="responses per prompt")
    parser.add_argument("--out", type=named, metavar="DIR", help="folder for evaluation.json, samples.jsonl")
    # Not by argparse, to which the value of an option that it does not know is a word like any other.
    first = list(arguments[:1]) if arguments and not arguments[0].startswith("-") else []
    options, overrides = parser.parse_known_args(arguments[len(first) :])
    if options.help:
        print(parser.format_help() + "\n" + option_help(EvaluationConfig))
        return 0
    for key, value in (
        ("actor.model", first[0] if first else None),
        ("data.prompts", options.prompts),
        ("generation.samples", options.samples),
    ):
        if value is not None:
            overrides += [f"--{key}", str(value)]
    if options.reward is not None:
        kind = "model" if Path(options.reward).is_dir() else "function"
        overrides += [f"--reward.{kind}", options.reward]
    if options.out is not None and (options.out / "evaluation.json").exists():
        raise UserError(f"--out {options.out}: holds an evaluation already; choose another folder")
    given = read_given(EvaluationConfig, options.config, overrides)
    config = validated(EvaluationConfig, given.values, given.place)
    config, _ = hub.localised(config, None)
    for role in ("actor", "reward") if config.reward.has_model else ("actor",):
        source = getattr(config, role)
        layout_of(role, source.layout, spec_of(role, source))  # before any process starts
    out = None if options.out is None else str(options.out)
    local.run("puzzle.rlhf.evaluation:process", (config.resolved(), out), config.layout.world)
    return 0
