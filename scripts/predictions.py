#!/usr/bin/env python
"""A hundred fixed jobs and what is predicted for them: `python scripts/predictions.py` writes the file anew.

tests/plan/test_predictions.py holds predictions to the file, so that a change of the model, of a schedule or
of a profile shows in its diff which jobs it moves, and by how much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from puzzle.plan.layout import Layout
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.iteration import Part, Workload, predict
from puzzle.plan.predict.lengths import Lengths
from puzzle.spec.published import published

FILE = Path(__file__).resolve().parents[1] / "tests" / "plan" / "predictions.txt"
MACHINES = ("h200", "a800-pcie", "published-orion", "published-phoenix")
PAIRS = (("7b", "350m"), ("7b", "7b"), ("13b", "7b"), ("33b", "7b"), ("13b", "350m"))
LAYOUTS = (
    ((1, 8, 1), (2, 4, 1)),
    ((2, 4, 1), (2, 4, 1)),
    ((2, 2, 2), (4, 1, 2)),
    ((1, 4, 4), (4, 2, 2)),
    ((8, 1, 4), (8, 1, 4)),
)
OPTIONS = (
    {},
    {"fuse_training": True, "fuse_inference": True},
    {"split": True, "lengths": Lengths.exponential(64, 256)},
    {"recompute": True, "offload": True, "graphs": True, "decode": 32},
)


def jobs() -> Iterator[tuple[str, str, Workload]]:
    """Name, calibration and work of each: every machine, pair and layout once, with options in turn."""
    for number, (machine, pair, laid) in enumerate(itertools.product(MACHINES, PAIRS, LAYOUTS)):
        actor, critic = (published(name) for name in pair)
        train, generate = laid
        policy = Part(actor, Layout.even(*train, actor.num_layers))
        judge = Part(replace(critic, head="value"), Layout.even(*train, critic.num_layers))
        options = OPTIONS[(number + number // len(LAYOUTS)) % len(OPTIONS)]
        work = Workload(
            actor=policy,
            generation=Layout.even(*generate, actor.num_layers),
            trained=(policy, judge),
            inferred=(policy, judge, judge),
            stepped=2,
            sequences=128,
            minibatch=64,
            steps=2,
            prompt=256,
            response=256,
            microbatch=2,
        )
        layouts = "->".join(",".join(map(str, sizes)) for sizes in laid)
        said = "+".join(name for name, value in options.items() if value) or "plain"
        yield f"{machine} {'/'.join(pair)} {layouts} {said}", machine, replace(work, **options)


def text() -> str:
    """A line per job: seconds of switch, generation, inference and training."""
    lines = []
    for name, machine, work in jobs():
        seconds = predict(work, read_calibration(machine).costs)
        stages = (seconds.switch, seconds.generation, seconds.inference, seconds.training)
        lines.append(f"{name}:" + "".join(f" {value:.4g}" for value in stages))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
