"""`python -m puzzle.plotting`: draws every figure and table that the logs hold."""

from puzzle.errors import UserError, exit_code, say_signals
from puzzle.files.path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is looked for
    say_signals()

import difflib
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from puzzle.plotting import ablation, figure10, figure12, style, table3
from puzzle.plotting.irregularities import PUBLISHED, READINGS
from puzzle.plotting.loading import load, printable
from puzzle.plotting.options import Parser, folder
from puzzle.plotting.output import whole
from puzzle.plotting.rows import RATIO, SECONDS, Row, drawn, ordered, write_csv
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog.run import Loaded, Report

FIGURES = {one.NAME: one for one in (figure8, figure9, figure10, figure11, figure12, table3, ablation)}
SHIPPED = ("published", "baseline/2xh200", "baseline/4xh200")
"""Folders of the shipped logs that are drawn where none is named: the published measurements, and our own."""
FEW = 3
"""Folders of logs that are named where the results are printed; of more their number."""
SHOWN = 20
"""Missing values printed; report.txt holds all, with notes and what readers say of logs."""
REPORT = "report.txt"


def parser() -> Parser:
    """The options of the command."""
    logs = Path(__file__).resolve().parent.parent / "logs"
    out = Path(f"outputs_from_logs_{datetime.now():%Y%m%d-%H%M%S}")
    made = Parser(
        "python -m puzzle.plotting",
        description="Draw figures 8-12 and table 3 from run logs.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--logs",
        type=folder,
        action="append",
        metavar="DIR",
        help=f"may be repeated (under {logs}: {', '.join(SHIPPED)})",
    )
    made.add_argument("--out", type=folder, default=out, metavar="DIR", help="outputs_from_logs_<time>")
    made.add_argument("--only", nargs="+", action="extend", metavar="FIGURE", help=f"of {', '.join(FIGURES)}")
    made.add_argument(
        "--reading", default=PUBLISHED, metavar="|".join(READINGS), help="how to compute (published)"
    )
    made.set_defaults(shipped=logs)
    return made


def with_constants(loaded: Loaded, published: Path) -> Loaded:
    """With the theoretical values of published runs of figure 10: constants that no raw log holds."""
    wanted = figure10.lacking(loaded.runs)
    if not wanted or not published.is_dir():
        return loaded
    found = figure10.constants(load([published]).runs, wanted)
    report = Report("logs/published", None, f"{len(found)} theoretical values of figure 10 come from there")
    return Loaded(loaded.runs + tuple(found), loaded.reports + (report,) * bool(found))


def draw(loaded: Loaded, wanted: Sequence[str], reading: str, folder: Path) -> dict[str, list[Row]]:
    """Writes the wanted figures into `folder`; returns their rows. Raises UserError if there is nothing."""
    found: dict[str, list[Row]] = {}
    for name in wanted:
        found[name] = FIGURES[name].numbers(loaded.runs, reading)
    if not any(row.value is not None for rows in found.values() for row in rows):
        raise UserError(f"the logs hold no numbers for {', '.join(wanted)}; is --logs the right folder?")
    for name, rows in found.items():
        if rows:
            notes = FIGURES[name].notes(rows)
            main = RATIO if drawn(rows, RATIO) else SECONDS
            write_csv(folder / f"{name}.csv", drawn(rows, main))
            if main == RATIO:
                write_csv(folder / f"{name}_seconds.csv", drawn(rows, SECONDS))
            with style.applied():
                style.save(FIGURES[name].draw(rows, notes), folder / name)
    return found


def remarks(found: dict[str, list[Row]]) -> list[str]:
    """Missing values and footnotes, one line each."""
    lines = []
    for name, rows in found.items():
        if not rows:
            lines.append(f"missing: {name}: no log of this figure")
        for row in rows:
            config = f"{name} {row.cluster} {row.config}"
            if row.value is None and (row.unit == RATIO or not drawn(rows, RATIO)):
                lines.append(f"missing: {config} {row.series}: {row.gap}")
            for note in row.notes:
                alike = [
                    other for other in rows if (other.cluster, other.config) == (row.cluster, row.config)
                ]
                several = sum(note in other.notes for other in alike) > 1
                lines.append(f"note: {config}{'' if several else f' {row.series}'}: {note}")
    return ordered(lines)


def reported(reports: Iterable[Report]) -> list[str]:
    """What the readers dropped, repaired or preferred, one line each."""
    lines = []
    for report in reports:
        line = "" if report.line is None else f":{report.line}"
        lines.append(printable(f"log: {report.source}{line}: {report.what}"))
    return ordered(lines)


def table(found: dict[str, list[Row]], logs: dict[str, int], out: Path) -> list[str]:
    """What was drawn from how many logs."""
    head = ("figure", "values", "missing", "logs", "files")
    body = []
    for name, rows in found.items():
        shown = drawn(rows, RATIO) or rows
        values = sum(row.value is not None for row in shown)
        files = f"{name}.pdf .png .csv" if rows else "-"
        body.append((name, str(values), str(len(shown) - values), str(logs[name]), files))
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in (head, *body)
    ]
    return [line.rstrip() for line in lines] + [f"in {out}"]


def chosen(only: Sequence[str] | None) -> list[str]:
    """The figures to draw. Raises UserError for a name that is none."""
    for name in only or ():
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--only {name}: unknown figure, there are {', '.join(FIGURES)}{hint}")
    return [name for name in FIGURES if not only or name in only]


def run(arguments: Sequence[str]) -> None:
    """The command. Raises UserError."""
    options = parser().parse_args(arguments)
    wanted = chosen(options.only)
    if options.reading not in READINGS:
        raise UserError(f"--reading {options.reading}: unknown reading, there are {', '.join(READINGS)}")
    folders = options.logs or [options.shipped / name for name in SHIPPED]
    loaded = load(folders)
    if not options.only and not any(ablation.NAME in run.figures for run in loaded.runs):
        wanted.remove(ablation.NAME)  # none of the published figures: nothing is missing without it
    if figure10.NAME in wanted:
        loaded = with_constants(loaded, options.shipped / SHIPPED[0])
    with whole(options.out) as folder:
        found = draw(loaded, wanted, options.reading, folder)
        told = remarks(found) + reported(loaded.reports)
        (folder / REPORT).write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
    kinds = {kind: [one for one in told if one.startswith(f"{kind}:")] for kind in ("missing", "note", "log")}
    logs = {
        name: len({log for row in rows if row.n for log in row.logs + row.base_logs})
        for name, rows in found.items()
    }
    named = ", ".join(map(str, folders)) if len(folders) <= FEW else f"{len(folders)} folders"
    print(f"reading: {options.reading}; logs: {named}")
    notes, remarked = len(kinds["note"]), len(kinds["log"])
    rest = f"{notes} notes on numbers and {remarked} on logs: {options.out / REPORT}"
    print("\n".join([*_few(kinds["missing"]), *table(found, logs, options.out), rest]), flush=True)


def _few(lines: list[str]) -> list[str]:
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"... and {rest} more of these, in {REPORT}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
