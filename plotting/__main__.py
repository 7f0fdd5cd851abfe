"""`python -m puzzle.plotting`: draws every figure and table that the logs hold."""

from puzzle.errors import UserError, exit_code, say_signals
from puzzle.files.path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is looked for
    say_signals()

import difflib
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from puzzle.plotting import ablation, figure10, figure12, published, report, style, table3
from puzzle.plotting.irregularities import PUBLISHED, READINGS
from puzzle.plotting.loading import load
from puzzle.plotting.options import Parser, folder
from puzzle.plotting.output import whole
from puzzle.plotting.rows import RATIO, SECONDS, Row, drawn, write_csv
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog.run import Loaded, Report

FIGURES: dict[str, report.Drawing] = {
    one.NAME: one for one in (figure8, figure9, figure10, figure11, figure12, table3, ablation)
}
SHIPPED = ("published", "baseline/2xh200", "baseline/4xh200")
"""Folders of the shipped logs that are drawn where none is named: the published measurements, and our own;
with them all folders in `CAMPAIGNS`."""
CAMPAIGNS = "campaign"


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
        help=f"may be repeated (under {logs}: {', '.join((*SHIPPED, CAMPAIGNS))})",
    )
    made.add_argument("--out", type=folder, default=out, metavar="DIR", help="outputs_from_logs_<time>")
    made.add_argument("--only", nargs="+", action="extend", metavar="FIGURE", help=f"of {', '.join(FIGURES)}")
    made.add_argument(
        "--reading", default=PUBLISHED, metavar="|".join(READINGS), help="how to compute (published)"
    )
    made.set_defaults(shipped=logs)
    return made


def shipped(logs: Path) -> list[Path]:
    """The folders of the shipped logs to draw."""
    campaigns = sorted(path for path in (logs / CAMPAIGNS).glob("*") if path.is_dir())
    return [*(logs / name for name in SHIPPED), *campaigns]


def with_constants(loaded: Loaded, published: Path) -> Loaded:
    """With the theoretical values of published runs of figure 10: constants that no raw log holds."""
    wanted = figure10.lacking(loaded.runs)
    if not wanted or not published.is_dir():
        return loaded
    found = figure10.constants(load([published]).runs, wanted)
    said = Report("logs/published", None, f"{len(found)} theoretical values of figure 10 come from there")
    return Loaded(loaded.runs + tuple(found), loaded.reports + (said,) * bool(found))


def draw(loaded: Loaded, wanted: Sequence[str], reading: str, folder: Path) -> dict[str, list[Row]]:
    """Writes the wanted figures into `folder`; returns their rows. Raises UserError if there is nothing."""
    found: dict[str, list[Row]] = {}
    for name in wanted:
        found[name] = FIGURES[name].numbers(loaded.runs, reading)
    if not any(row.value is not None for rows in found.values() for row in rows):
        raise UserError(f"the logs hold no numbers for {', '.join(wanted)}; is --logs the right folder?")
    for name, rows in found.items():
        if rows:
            _progress(f"drawing {name} ...")
            notes = FIGURES[name].notes(rows)
            main = RATIO if drawn(rows, RATIO) else SECONDS
            write_csv(folder / f"{name}.csv", drawn(rows, main))
            if main == RATIO:
                write_csv(folder / f"{name}_seconds.csv", drawn(rows, SECONDS))
            with style.applied():
                style.save(FIGURES[name].draw(rows, notes), folder / name)
    return found


def _progress(text: str) -> None:
    """What is being done, for who watches a terminal: the next such line takes its place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def chosen(only: Sequence[str] | None) -> list[str]:
    """The figures to draw. Raises UserError for a name that is none."""
    for name in only or ():
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--only {name}: unknown figure, there are {', '.join(FIGURES)}{hint}")
    return [name for name in FIGURES if not only or name in only]


def _drawn(options: Namespace, wanted: list[str]) -> report.Results:
    """Reads the logs, draws the figures and writes the report. Raises UserError."""
    folders = options.logs or shipped(options.shipped)
    _progress("reading logs ...")
    loaded = load(folders)
    if not options.only and not any(ablation.NAME in run.figures for run in loaded.runs):
        wanted.remove(ablation.NAME)  # none of the published figures: nothing is missing without it
    if figure10.NAME in wanted:
        loaded = with_constants(loaded, options.shipped / SHIPPED[0])
    with whole(options.out) as folder:
        found = draw(loaded, wanted, options.reading, folder)
        numbers = options.shipped / SHIPPED[0] / published.FILE
        comparison = published.compare(found, published.read(numbers)) if numbers.exists() else None
        results = report.Results(found, FIGURES, options.reading, loaded.reports, comparison)
        (folder / report.REPORT).write_text(report.page(results), encoding="utf-8")
    return results


def run(arguments: Sequence[str]) -> None:
    """The command. Raises UserError."""
    options = parser().parse_args(arguments)
    wanted = chosen(options.only)
    if options.reading not in READINGS:
        raise UserError(f"--reading {options.reading}: unknown reading, there are {', '.join(READINGS)}")
    try:
        results = _drawn(options, wanted)
    finally:
        _progress("")
    print("\n".join(report.told(results, options.out)), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
