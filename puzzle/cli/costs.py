"""Costs of a simulation from files that people bring: a table of seconds, or the trace of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from puzzle.errors import UserError
from puzzle.files import jsonio
from puzzle.files.jsonio import Fields
from puzzle.plan.pipeline.actions import COLLECTIVES, COMPUTE, Payload
from puzzle.plan.simulate.cost import CostTable, Seconds, starts
from puzzle.plan.simulate.measured import measured_costs
from puzzle.plan.simulate.timeline import MOST_SECONDS, Timeline

KINDS = sorted({*map(str, COMPUTE), *map(str, COLLECTIVES), *map(starts, COLLECTIVES), *map(str, Payload)})


def read_table(path: Path, stages: int) -> CostTable:
    """The table {"model": {"forward": seconds or [per stage], ...}}; UserError naming model and kind."""
    table: dict[str, dict[str, Seconds]] = {}
    for model, costs in Fields(jsonio.read(path), str(path)).sections():
        for kind in costs:
            if kind not in KINDS:
                raise UserError(f"{costs.place}: {kind} is no cost; there are {', '.join(KINDS)}")
        table[model] = {kind: _seconds(costs, kind, stages) for kind in costs}
    return CostTable(table)


def _seconds(costs: Fields, kind: str, stages: int) -> Seconds:
    value = costs.values[kind]
    if not isinstance(value, list):
        return costs.number(kind, least=0.0, most=MOST_SECONDS)
    if not 1 <= len(value) <= stages:
        costs.refuse(kind, f"seconds, or from 1 to {stages} of them, one per stage")
    return tuple(Fields({kind: one}, costs.place).number(kind, least=0.0, most=MOST_SECONDS) for one in value)


def read_trace(path: Path, stages: int, tied: Collection[str]) -> CostTable:
    """Costs from a run in which rank r played stage r * stages / ranks, as in every default placement."""
    timeline = Timeline.from_perfetto(jsonio.read(path), str(path))
    ranks = timeline.rows
    if not ranks or len(ranks) % stages:
        raise UserError(f"{path}: {len(ranks)} ranks do not make --pp {stages} stages")
    try:
        return measured_costs(
            timeline, {rank: i * stages // len(ranks) for i, rank in enumerate(ranks)}, tied
        )
    except (ValueError, KeyError) as error:  # spans that are no passes of a schedule
        raise UserError(f"{path}: no trace of a run ({type(error).__name__}: {error})") from None
