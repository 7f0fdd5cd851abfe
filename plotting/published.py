"""The numbers that were published, beside those that are computed here."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle.plotting.irregularities import has_published
from puzzle.plotting.rows import Row

FILE = "figures.csv"
"""In the folder of the published logs: every number that the published scripts compute from the raw logs."""
SPREAD = " spread"
"""Behind a series in that file: the value is the length of its whisker."""
NEAR = 1e-9
"""Two numbers this near each other differ in the order of sums alone."""


@dataclass(frozen=True)
class Number:
    """One published number; `spread` says that it is the spread of that series."""

    figure: str
    cluster: str
    config: str
    series: str
    spread: bool
    value: float
    unit: str


@dataclass(frozen=True)
class Comparison:
    """How many published numbers were computed again, of how many; a line for each that was not."""

    same: int
    numbers: int
    differing: tuple[str, ...] = ()


def read(path: Path) -> list[Number]:
    """The numbers of a file with columns `figure,cluster,config,series,value,unit`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Number(
                row["figure"],
                row["cluster"],
                row["config"],
                row["series"].removesuffix(SPREAD),
                row["series"].endswith(SPREAD),
                float(row["value"]),
                row["unit"],
            )
            for row in csv.DictReader(file)
        ]


def compare(found: Mapping[str, Sequence[Row]], numbers: Sequence[Number]) -> Comparison | None:
    """Of the figures in `found` that draw published logs; None where none does."""
    shown = {name for name, rows in found.items() if has_published(rows)}
    asked = [number for number in numbers if number.figure in shown]
    if not asked:
        return None
    rows = {
        (name, row.cluster.removesuffix(" (published)"), row.config, row.series, row.unit): row
        for name in shown
        for row in found[name]
        if row.provenance == "published"
    }
    differing = []
    for one in asked:
        row = rows.get((one.figure, one.cluster, one.config, one.series, one.unit))
        value = None if row is None else row.spread if one.spread else row.value
        if value is None or not math.isclose(value, one.value, rel_tol=0, abs_tol=NEAR):
            here = "no value" if value is None else f"{value:.6g}"
            what = f"{one.figure} {one.cluster} {one.config} {one.series}{SPREAD * one.spread}"
            differing.append(f"{what}: {here}, published {one.value:.6g}{' s' * (one.unit == 's')}")
    return Comparison(len(asked) - len(differing), len(asked), tuple(differing))
