"""What a figure is made of: rows of numbers, and their CSV form."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("cluster", "config", "series", "value", "unit", "n", "spread", "source")
RATIO = "1"
SECONDS = "s"


@dataclass(frozen=True)
class Row:
    """One number of one figure.

    `value` is None where no log gives it; `gap` then says why in two words. `spread` is one standard
    deviation over iterations, or over repeats where a run was repeated, unless the figure says otherwise; `n`
    counts what it was taken over. `logs` were averaged, for a ratio over `base_logs`; `notes` are footnotes.
    """

    cluster: str
    config: str
    series: str
    value: float | None
    unit: str
    n: int
    spread: float | None
    logs: tuple[str, ...]
    provenance: str
    base_logs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    gap: str = ""

    @property
    def source(self) -> str:
        """The logs behind the number, in a ratio the baseline's first."""
        own = "; ".join(self.logs)
        return f"{'; '.join(self.base_logs)} over {own}" if self.base_logs else own


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes `rows` with full precision; a missing value or spread is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            value = "" if row.value is None else repr(float(row.value))
            spread = "" if row.spread is None else repr(float(row.spread))
            writer.writerow((row.cluster, row.config, row.series, value, row.unit, row.n, spread, row.source))


def ordered(values: Iterable[str]) -> list[str]:
    """The distinct values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def drawn(rows: Sequence[Row], unit: str) -> list[Row]:
    """The rows of one unit: a figure of ratios carries the seconds behind its bars as further rows."""
    return [row for row in rows if row.unit == unit]


def by_cluster(rows: Iterable[Row], text: Callable[[list[Row]], str], between: str = ", ") -> str:
    """What `text` says of each cluster's rows, those without a number left out; clusters in order."""
    told = []
    rows = [row for row in rows if row.value is not None]
    for cluster in ordered(row.cluster for row in rows):
        told.append(f"{cluster} {text([row for row in rows if row.cluster == cluster])}")
    return between.join(told) or "no values"


def span(rows: Iterable[Row]) -> str:
    """`least-most` of the rows' numbers, or the one that they all are."""
    values = [row.value for row in rows if row.value is not None]
    ends = [f"{end:.2f}" for end in (min(values), max(values))] if values else ["-"]
    return "-".join(ordered(ends))
