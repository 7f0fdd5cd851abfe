"""`puzzle report`: one page about runs, to be read in a browser or as text."""

from __future__ import annotations

from pathlib import Path

from puzzle.cli import Parser, named, new_file
from puzzle.errors import UserError
from puzzle.files import durable


def run(arguments: list[str]) -> int:
    """`puzzle report OUT [OUT ...]`: OUT/report.html and report.md, or the files that are named."""
    parser = Parser("puzzle report", description="Write a page about runs: HTML in one file, and Markdown.")
    parser.add_argument("runs", nargs="+", type=named, metavar="OUT", help="folder of a run, or of several")
    parser.add_argument("--html", type=new_file, metavar="FILE", help="default: report.html in the first OUT")
    parser.add_argument("--markdown", type=new_file, metavar="FILE", help="default: report.md beside it")
    given = parser.parse_args(arguments)

    from puzzle.report import page

    first: Path = given.runs[0]
    runs = page.facts_of(given.runs)
    target: Path = given.html or (first if first.is_dir() else first.parent) / "report.html"
    other: Path = given.markdown or target.with_name(f"{target.stem}.md")
    if target == other:
        raise UserError(f"--html and --markdown are both {target}; name two files")
    for file, write in ((target, page.html), (other, page.markdown)):
        durable.write_text(file, write(runs, file.resolve().parent))
        print(f"{file}")
    return 0
