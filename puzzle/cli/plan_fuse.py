"""`puzzle plan fuse`: which models share a pipeline, in which order, and what it saves, by simulation."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle.cli import Parser, named, whole
from puzzle.cli.costs import read_table, read_trace
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.search import (
    MOST_TRIALS,
    Estimate,
    choose_fusion,
    inference_candidates,
    search_trials,
    trained_apart,
    training_candidates,
)
from puzzle.plan.simulate.simulate import simulate
from puzzle.plan.simulate.timeline import Timeline

MOST_PASSES = 2048
"""Of a schedule; and per order of the models, of which training tries several schedules: some ten seconds."""
MOST_TRAINED, MOST_INFERRED = 2 * MOST_PASSES, 12 * MOST_PASSES


def run(arguments: list[str]) -> int:
    """Print the candidates from best to worst; with --out also draw the best beside the unshared one."""
    given = _parser().parse_args(arguments)
    models = _models(given)
    if given.trace is None:
        cost = read_table(given.costs, given.pp)
    else:
        cost = read_trace(given.trace, given.pp, given.tied)
    planned = [PipelineModel(name, count, tied=name in given.tied) for name, count in models.items()]
    if given.training:
        cost.require(trained_apart(planned, given.pp, cost).schedules)
        candidates = training_candidates(planned, given.pp, cost)
    else:
        candidates = inference_candidates(planned, given.pp)
        cost.require(candidates[0].schedules)
    estimates = choose_fusion(candidates, cost)
    apart = next(e for e in estimates if e.candidate is candidates[0])
    print(json.dumps([_row(e, apart) for e in estimates]) if given.json else _table(estimates, apart))
    tried = search_trials(planned, given.pp)
    if given.training and len(models) > 1 and tried < MOST_TRIALS and not given.json:
        print(f"searched: the best of {tried} orders instead of {MOST_TRIALS}, since schedules are long")
    if given.out:
        _draw(given.out, estimates[0], apart, cost)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="puzzle plan fuse", description="Choose which models share a pipeline.")
    parser.add_argument("--pp", type=whole(1, MOST_PROCESSES), required=True, help="pipeline stages")
    work = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("training", "trained"), ("inference", "run forward")):
        help_text = f"models to be {text} and their micro-batches, as actor=8 critic=8"
        work.add_argument(f"--{name}", nargs="+", type=_count, metavar="MODEL=N", help=help_text)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--costs",
        type=named,
        help='JSON: {"actor": {"forward": seconds or [per stage], ...}}; with backward_input and'
        " backward_weight also split backwards",
    )
    source.add_argument("--trace", type=named, help="trace of a run that trained the models apart")
    parser.add_argument("--tied", nargs="+", default=[], metavar="MODEL", help="models with tied embeddings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=named, metavar="DIR", help="write a drawing and a Perfetto trace of the best"
    )
    return parser


def _count(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not re.fullmatch("[0-9]{1,30}", number) or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write MODEL=N with N of at least 1")
    return name, int(number)


def _models(given: argparse.Namespace) -> dict[str, int]:
    """The models and their micro-batches; UserError for what no simulation would be done with."""
    pairs = given.training or given.inference
    models = dict(pairs)
    if len(models) < len(pairs):
        raise UserError("a model is given twice; give each once, with all of its micro-batches")
    if unknown := [name for name in given.tied if name not in models]:
        raise UserError(f"--tied {unknown[0]}: no model of that name; there are {', '.join(models)}")
    microbatches = sum(models.values())
    passes, arranged = given.pp * microbatches, MOST_TRAINED if given.training else MOST_INFERRED
    most = min(MOST_PASSES, arranged // math.factorial(len(models)))
    if passes > most:
        raise UserError(
            f"--pp {given.pp} x {microbatches} micro-batches = {passes} passes; of {len(models)} models at"
            f" most {most} are simulated, since every order of the models is"
        )
    return models


def _row(estimate: Estimate, apart: Estimate) -> dict[str, Any]:
    return {
        "candidate": estimate.candidate.name,
        "seconds": estimate.seconds,
        "saved_share": 1 - estimate.seconds / apart.seconds if apart.seconds else 0.0,
        "flushes": estimate.flushes,
        "bubble_share": estimate.bubble_share,
        "hashes": [schedule.hash for schedule in estimate.candidate.schedules],
        "orders": [
            [a.model for a in s.actions[0] if a.op == "forward"] for s in estimate.candidate.schedules
        ],
    }


def _table(estimates: Sequence[Estimate], apart: Estimate) -> str:
    lines = ["   seconds   saved  flushes    idle  candidate"]
    for estimate in estimates:
        row = _row(estimate, apart)
        numbers = (
            f"{row['seconds']:10.4g} {row['saved_share']:7.1%} {row['flushes']:8d} {row['bubble_share']:7.1%}"
        )
        lines.append(f"{numbers}  {row['candidate']}")
    return "\n".join([*lines, f"chosen: {estimates[0].candidate.name}"])


def _draw(out: Path, best: Estimate, apart: Estimate, cost: CostTable) -> None:
    from puzzle.plotting.output import whole
    from puzzle.plotting.style import save
    from puzzle.plotting.timeline import gantt

    traces: dict[str, Mapping[str, Any]] = {}
    for estimate in dict.fromkeys((apart, best)):
        timelines = [simulate(schedule, cost) for schedule in estimate.candidate.schedules]
        traces[estimate.candidate.name] = Timeline.after_one_another(timelines).to_perfetto()
    with whole(out) as folder:
        save(gantt(traces), folder / "fuse")
        (folder / "fuse.json").write_text(json.dumps(traces[best.candidate.name]))
    print(f"drawn in {out}: fuse.png, fuse.pdf; trace of {best.candidate.name}: fuse.json")
