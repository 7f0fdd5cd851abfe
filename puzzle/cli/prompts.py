"""`puzzle prompts`: a file of prompts whose answers can be judged."""

from __future__ import annotations

import argparse
import json
from typing import Any

from puzzle.cli import Parser, filled, new_file, whole
from puzzle.data.gym import gym_prompts
from puzzle.files import durable
from puzzle.files.jsonio import parse
from puzzle.files.limits import MOST_SEED, MOST_SEQUENCES


def run(arguments: list[str]) -> int:
    """`puzzle prompts OUT.jsonl --task NAME`."""
    parser = Parser("puzzle prompts", description="Write prompts of a task of reasoning-gym, as JSONL.")
    parser.add_argument("out", type=new_file, help="file to write, .jsonl")
    parser.add_argument("--task", type=filled, required=True, help="such as chain_sum")
    parser.add_argument("--count", type=whole(1, MOST_SEQUENCES), default=1000, help="prompts [1000]")
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="[0]")
    parser.add_argument("--options", type=_options, default={}, help="of the task, as JSON")
    given = parser.parse_args(arguments)
    rows = gym_prompts(given.task, given.count, given.seed, given.options)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    durable.write_text(given.out, text)
    print(f"{given.out}: {given.count} prompts of {given.task}")
    return 0


def _options(text: str) -> dict[str, Any]:
    found = parse(text, "--options")
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: give a JSON object")
    return found
