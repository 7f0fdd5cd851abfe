"""`puzzle bench COMMAND`: measurements and checks on the devices of this host."""

from __future__ import annotations

import sys

from puzzle.cli import dispatch
from puzzle.launch import local

BENCHES = {
    "memory": ("memory:run", "measure the peak memory of PPO stages beside the formula"),
    "check": ("check:CheckBench.run", "compare with transformers on this device, in the layouts that fit"),
    "iterations": ("iterations:run", "compare whole runs on devices with one process on a CPU"),
    "exact": (
        "exact:run",
        "compare runs with invariant numerics bit for bit, and time them beside fast ones",
    ),
    "numerics": (
        "numerics:NumericsBench.run",
        "time kernels of invariant numerics, tile by tile, beside fast ones",
    ),
    "switch": ("switch:SwitchBench.run", "time changes of layout, three strategies beside the links' floor"),
    "overlap": ("overlap:OverlapBench.run", "time the way to generation, also beside the first prefill"),
    "train": ("train:TrainBench.run", "time training and forward passes"),
    "fuse": ("fuse:FuseBench.run", "time several models in one pipeline beside one after the other"),
    "generate": ("generate:GenerateBench.run", "time prefill and decoding"),
    "sums": ("sums:SumsBench.run", "compare and time sums over tensor ranks out of peers' memory"),
    "tails": ("tails:TailsBench.run", "time rewards that begin while the longest responses are decoded"),
    "transformers": ("transformers_beside:TransformersBench.run", "time generation beside transformers' own"),
    "calibrate": ("calibrate:CalibrateBench.run", "measure what puzzle plan predict and search rest on"),
    "checkpoint": ("train:CheckpointBench.run", "time training steps while a checkpoint is written"),
}
"""What runs a bench, in puzzle.bench; and what that does."""


def run(arguments: list[str]) -> int | None:
    """Run the measurement asked for."""
    texts = {name: text for name, (_, text) in BENCHES.items()}
    try:
        return dispatch("puzzle bench", texts, lambda name: f"puzzle.bench.{BENCHES[name][0]}", arguments)
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
