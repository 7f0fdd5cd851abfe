"""Logs written for tests."""

import math

from puzzle.runlog import Run, RunWriter
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.records import (
    Checkpoint,
    End,
    Iteration,
    Rank,
    Simulation,
    Stage,
    Switch,
    Trace,
)
from tests.runlog import texts


def write(folder, count=3, variant="opt", **header):
    with RunWriter(folder, texts.header(variant=variant, **header)) as writer:
        writer.write(Rank(0, coordinates={"training": [0, 0, 0]}, parameter_bytes=1024, device="cpu"))
        writer.write(Stage("training", "1f1b", "9a", actions={"forward": 8}, flushes=1, bubble_share=0.25))
        writer.write(Simulation(1, "training", {"apart": 3.0, "fused": 2.0}))
        for index in range(count):
            parts, e2e = texts.stages(1.5 + index, 0.5, 2.0, switch=0.25, other=0.125)
            more = {"bytes": 4096, "lower_bound_bytes": 4096, "local_share": 0.5}
            writer.write(Switch(index, 0.25, fields=more))
            writer.write(
                Iteration(
                    index, parts, e2e, {"reward": 0.5, "actor_loss": 1.0, "critic_loss": 2.0, "kl": 0.1}
                )
            )
        writer.sample(0, "Why?", "Because.", score=math.nan)
        writer.write(Checkpoint(count - 1, "checkpoints/2", seconds=1.0, bytes=10))
        writer.write(Trace("trace.json", iteration=1))
        writer.write(Rank(0, collective_bytes={"all_reduce": 77}))
        writer.write(End("completed"))
    return folder


def read(folder):
    run = read_jsonl(folder / "run.jsonl")
    assert isinstance(run, Run), run
    return run
