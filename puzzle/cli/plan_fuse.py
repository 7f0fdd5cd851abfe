"""`puzzle plan fuse`: which models share a pipeline, in which order, and what it saves, by simulation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle import jsonio
from puzzle.cli import Parser
from puzzle.errors import UserError
from puzzle.plan.cost import CostTable
from puzzle.plan.measured import measured_costs
from puzzle.plan.schedules import PipelineModel
from puzzle.plan.search import (
    Estimate,
    choose_fusion,
    inference_candidates,
    trained_apart,
    training_candidates,
)
from puzzle.plan.simulate import simulate
from puzzle.plan.timeline import Timeline


def run(arguments: list[str]) -> int:
    """Print the candidates from best to worst; with --out also draw the best beside the unshared one."""
    given = _parser().parse_args(arguments)
    models = dict(given.training or given.inference)
    if given.pp < 1:
        raise UserError(f"--pp is {given.pp}; it must be at least 1")
    cost = _costs(given)
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
    if given.out:
        _draw(given.out, estimates[0], apart, cost)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="puzzle plan fuse", description="Choose which models share a pipeline.")
    parser.add_argument("--pp", type=int, required=True, help="pipeline stages")
    work = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("training", "trained"), ("inference", "run forward")):
        help_text = f"models to be {text} and their micro-batches, as actor=8 critic=8"
        work.add_argument(f"--{name}", nargs="+", type=_count, metavar="MODEL=N", help=help_text)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--costs",
        type=Path,
        help='JSON: {"actor": {"forward": seconds or [per stage], ...}}; with backward_input and'
        " backward_weight also split backwards",
    )
    source.add_argument("--trace", type=Path, help="trace of a run that trained the models apart")
    parser.add_argument("--tied", nargs="+", default=[], metavar="MODEL", help="models with tied embeddings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write a drawing and a Perfetto trace of the best"
    )
    return parser


def _count(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write MODEL=N with N of at least 1")
    return name, int(number)


def _costs(given: argparse.Namespace) -> CostTable:
    path: Path = given.costs or given.trace
    found = jsonio.read(path)
    if given.trace:
        try:
            return _traced(Timeline.from_perfetto(found, str(path)), given)
        except (ValueError, KeyError) as error:  # spans that are no passes of a schedule
            raise UserError(f"{path}: no trace of a run ({type(error).__name__}: {error})") from None
    table = jsonio.Fields(found, str(path))
    return CostTable(
        {
            model: {what: _seconds(costs, what, given.pp) for what in costs}
            for model, costs in table.sections()
        }
    )


def _traced(timeline: Timeline, given: argparse.Namespace) -> CostTable:
    """Costs from a run in which rank r played stage r * pp / ranks, as in every default placement."""
    ranks = timeline.rows
    if not ranks or len(ranks) % given.pp:
        raise UserError(f"{given.trace}: {len(ranks)} ranks do not make --pp {given.pp} stages")
    return measured_costs(
        timeline, {rank: i * given.pp // len(ranks) for i, rank in enumerate(ranks)}, given.tied
    )


def _seconds(costs: jsonio.Fields, what: str, stages: int) -> float | tuple[float, ...]:
    value = costs.values[what]
    if not isinstance(value, list):
        return costs.number(what, least=0.0)
    if len(value) > stages:
        costs.refuse(what, f"seconds, or at most {stages} of them, one per stage")
    return tuple(jsonio.Fields({what: x}, costs.place).number(what, least=0.0) for x in value)


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
    from plotting.output import whole
    from plotting.style import save
    from plotting.timeline import gantt

    traces: dict[str, Mapping[str, Any]] = {}
    for estimate in dict.fromkeys((apart, best)):
        timelines = [simulate(schedule, cost) for schedule in estimate.candidate.schedules]
        traces[estimate.candidate.name] = Timeline.after_one_another(timelines).to_perfetto()
    with whole(out) as folder:
        save(gantt(traces), folder / "fuse")
        (folder / "fuse.json").write_text(json.dumps(traces[best.candidate.name]))
    print(f"drawn in {out}: fuse.png, fuse.pdf; trace of {best.candidate.name}: fuse.json")
