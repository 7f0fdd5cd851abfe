"""What is said of the figures: a few lines where they are drawn, everything in a page beside them."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from puzzle.plotting.irregularities import CORRECTED
from puzzle.plotting.loading import printable
from puzzle.plotting.published import Comparison
from puzzle.plotting.rows import RATIO, Row, drawn, ordered
from puzzle.runlog.run import Report, Run

REPORT = "report.md"
FEW = 5
"""Lines of one kind where results are printed; the page has all."""
WIDTH = 110
"""Columns of a printed line."""


class Drawing(Protocol):
    """A figure or table: what it is made of, what is said of it, how it is drawn."""

    @property
    def NAME(self) -> str: ...
    @property
    def TITLE(self) -> str: ...
    def numbers(self, runs: Sequence[Run], reading: str) -> list[Row]: ...
    def headline(self, rows: Sequence[Row]) -> str: ...
    def notes(self, rows: Sequence[Row]) -> list[str]: ...
    def draw(self, rows: Sequence[Row], notes: Sequence[str]) -> Figure: ...


@dataclass(frozen=True)
class Results:
    """What was drawn: rows by the figure's name, how they were computed, and beside what was published."""

    found: Mapping[str, Sequence[Row]]
    figures: Mapping[str, Drawing]
    reading: str
    reports: Sequence[Report]
    comparison: Comparison | None

    @property
    def missing(self) -> list[str]:
        """Figures and numbers that should be there and are not, and why, one line each."""
        without = [name for name, rows in self.found.items() if not rows]
        lines = [f"{', '.join(without)}: no log"] if without else []
        for name, rows in self.found.items():
            for row in rows:
                if row.value is None and (row.unit == RATIO or not drawn(rows, RATIO)):
                    lines.append(f"{name} {row.cluster} {row.config} {row.series}: {row.gap}")
        return ordered(lines)

    @property
    def notes(self) -> list[str]:
        """Footnotes of numbers, one line each."""
        return [f"{name} {line}" for name in self.found for line in self.notes_of(name)]

    def notes_of(self, name: str) -> list[str]:
        """Footnotes of one figure's numbers, one line each."""
        lines = []
        for row in self.found[name]:
            for note in row.notes:
                alike = [
                    other
                    for other in self.found[name]
                    if (other.cluster, other.config) == (row.cluster, row.config)
                ]
                several = sum(note in other.notes for other in alike) > 1
                series = "" if several else f" {row.series}"
                lines.append(f"{row.cluster} {row.config}{series}: {note}")
        return ordered(lines)

    @property
    def logs(self) -> list[str]:
        """What the readers dropped, repaired or preferred, one line each."""
        lines = []
        for report in self.reports:
            line = "" if report.line is None else f":{report.line}"
            lines.append(printable(f"{report.source}{line}: {report.what}"))
        return ordered(lines)

    @property
    def published(self) -> str:
        """How many of the published numbers were computed again; empty where none is drawn."""
        if self.comparison is None:
            return ""
        said = f"{self.comparison.same} of {self.comparison.numbers} numbers as published"
        if self.reading == CORRECTED and self.comparison.differing:
            return f"{said}; the corrected reading gives others for the rest"
        return said


def told(results: Results, out: Path) -> list[str]:
    """The lines for who waits: what each figure says, what differs or is missing, and where all is."""
    width = max(map(len, results.found))
    lines = []
    for name, rows in results.found.items():
        if rows:
            figure = results.figures[name]
            text = f"{name.ljust(width)}  {figure.TITLE}: {figure.headline(rows)}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * (width + 2), break_long_words=False)
    lines += _few([f"missing: {line}" for line in results.missing])
    comparison = results.comparison
    if comparison is not None and results.reading != CORRECTED:
        lines += _few([f"not as published: {line}" for line in comparison.differing])
    notes, logs = len(results.notes), len(results.logs)
    lines.append(f"pictures (PDF, PNG) and numbers (CSV): {out}")
    lines.append(f"report, with {notes} notes on numbers and {logs} on logs: {out / REPORT}")
    return [*lines, results.published] if results.published else lines


def _few(lines: list[str]) -> list[str]:
    rest = len(lines) - FEW
    return lines if rest <= 1 else [*lines[:FEW], f"... and {rest} more of these, in {REPORT}"]


def page(results: Results) -> str:
    """The report: Markdown with the pictures and all that is to be said of their numbers."""
    lines = ["# Figures from logs", "", f"Reading: {results.reading}."]
    if results.published:
        lines += ["", f"**{results.published}.**"]
    differing = () if results.comparison is None else results.comparison.differing
    lines += _list("Not as published", differing) + _list("Missing", results.missing)
    for name, rows in results.found.items():
        if rows:
            figure = results.figures[name]
            lines += ["", f"## {name}", "", f"{figure.TITLE}: {figure.headline(rows)}.", ""]
            lines += [f"![{name}]({name}.png)", ""]
            lines += _list("", [*figure.notes(rows), *results.notes_of(name)])
            lines += ["", *_table(drawn(rows, RATIO) or rows)]
    return "\n".join(lines + _list("What the readers say of logs", results.logs)) + "\n"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    head = ["", f"## {title}", ""] if title else []
    return [*head, *(f"- {line}" for line in lines)] if lines else []


def _table(rows: Sequence[Row]) -> list[str]:
    """The numbers of a figure, a column per series: value +- spread (how many values were averaged)."""
    names = ordered(row.series for row in rows)
    cells = {(row.cluster, row.config, row.series): _cell(row) for row in rows}
    keys = list(dict.fromkeys((row.cluster, row.config) for row in rows))
    body = [[*key, *(cells.get((*key, name), "") for name in names)] for key in keys]
    return [_line(one) for one in (["cluster", "", *names], ["---"] * (len(names) + 2), *body)]


def _cell(row: Row) -> str:
    if row.value is None:
        return row.gap
    spread = "" if row.spread is None else f" +- {row.spread:.2g}"
    return f"{row.value:.3f}{spread}" + (f" ({row.n})" if row.n else "")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
