"""`puzzle bench WHAT`: measurements and checks on the devices of this host."""

from __future__ import annotations

import sys
from importlib import import_module

from puzzle.errors import UserError
from puzzle.launch import local

# Each module `puzzle.bench.WHAT` has `run(arguments: list[str]) -> int | None`.
BENCHES = {
    "memory": "measure the peak memory of PPO stages beside the formula",
    "check": "compare with transformers on this device, in the layouts that fit",
    "switch": "time changes of layout, three strategies beside the links' floor",
    "train": "time training and forward passes",
    "fuse": "time several models in one pipeline beside one after the other",
    "generate": "time prefill and decoding",
    "transformers": "time generation beside transformers, on the same prompts",
    "checkpoint": "time training steps while a checkpoint is written",
}


def run(arguments: list[str]) -> int | None:
    """Dispatch to the measurement asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in BENCHES.items()]
        print(
            "\n".join(["usage: puzzle bench WHAT ...", "", *lines, "", "puzzle bench WHAT --help says more."])
        )
        return 0 if arguments else 2
    if arguments[0] not in BENCHES:
        raise UserError(f"bench {arguments[0]}: there are {', '.join(BENCHES)}")
    try:
        return import_module(f"puzzle.bench.{arguments[0]}").run(arguments[1:])
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
