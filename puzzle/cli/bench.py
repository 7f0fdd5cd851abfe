"""`puzzle bench COMMAND`: measurements and checks on the devices of this host."""

from __future__ import annotations

import sys

from puzzle.cli import dispatch
from puzzle.launch import local

BENCHES = {
    "memory": "measure the peak memory of PPO stages beside the formula",
    "check": "compare with transformers on this device, in the layouts that fit",
    "switch": "time changes of layout, three strategies beside the links' floor",
    "overlap": "time the way to generation: from ZeRO shards, beside the first prefill",
    "train": "time training and forward passes",
    "fuse": "time several models in one pipeline beside one after the other",
    "generate": "time prefill and decoding",
    "transformers": "time generation beside transformers, on the same prompts",
    "checkpoint": "time training steps while a checkpoint is written",
}


def run(arguments: list[str]) -> int | None:
    """Run the measurement asked for."""
    try:
        return dispatch("puzzle bench", BENCHES, "puzzle.bench.", arguments)
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
