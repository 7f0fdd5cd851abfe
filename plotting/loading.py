"""Reading log folders into one list of runs."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from puzzle.errors import UserError, describe
from puzzle.plotting.selection import agree, gap
from puzzle.runlog import load_runs
from puzzle.runlog.records import GAP, End
from puzzle.runlog.run import Loaded, Report, Run


def load(folders: Sequence[Path]) -> Loaded:
    """All runs of `folders` together; a run that several folders hold alike counts once.

    Logs are named from the deepest folder that holds all of these: what is drawn from equal logs is equal,
    wherever they lie.

    Raises UserError where a folder is missing, is none, or holds no run.
    """
    runs: list[Run] = []
    reports: list[Report] = []
    seen: dict[tuple[str, int], Run] = {}
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            raise UserError(f"{folder}: {what}; --logs takes a folder of logs")
        try:
            loaded = _renamed(load_runs(Path(os.path.abspath(folder))), folder, folders)
        except OSError as error:
            raise UserError(f"{folder}: cannot read the logs: {describe(error)}") from None
        reports += loaded.reports
        for run in map(_printable, loaded.runs):
            first = seen.setdefault((run.run_id, run.repeat), run)
            if first is run:
                runs.append(run)
                reports += run.reports
                if not run.ended:
                    reports.append(Report(run.source, None, "the run has not ended, or its log is cut off"))
                # The reader of raw logs has reported what it notes.
                told = " ".join(report.what for report in run.reports)
                texts = [str(note.get("text", note)) for note in run.notes if note.get("kind") != GAP]
                reports += [Report(run.source, None, text) for text in texts if text not in told]
                reports += [Report(run.source, None, why) for why in _unrun(run)]
            elif agree(first, run):
                reports.append(Report(run.source, None, f"the same run as {first.source}; counted once"))
            else:
                raise UserError(
                    f"{first.source} and {run.source} are both repeat {run.repeat} of {run.run_id} and "
                    "disagree; remove one, or give them different repeat ids"
                )
    return Loaded(tuple(runs), tuple(reports))


def _unrun(run: Run) -> list[str]:
    """Why a planned run was not run, in full."""
    return [end.text for end in run.of(End) if gap(run) and end.text]


def _renamed(loaded: Loaded, folder: Path, folders: Sequence[Path]) -> Loaded:
    """With the paths of logs in `folder` as they are from the deepest folder that holds all `folders`."""
    top = os.path.commonpath([os.path.abspath(one) for one in folders])
    here = os.path.abspath(folder)
    old, new = f"{here}{os.sep}", os.path.relpath(here, top) + os.sep
    new = "" if new == f".{os.sep}" else new

    def name(text: str) -> str:
        return text.replace(old, new)

    def report(one: Report) -> Report:
        return replace(one, source=name(one.source), what=name(one.what))

    runs = [
        replace(run, source=name(run.source), reports=tuple(map(report, run.reports))) for run in loaded.runs
    ]
    return Loaded(tuple(runs), tuple(map(report, loaded.reports)))


def _printable(run: Run) -> Run:
    """The run with names that can be written anywhere: file names may hold any bytes."""
    return replace(
        run,
        cluster=printable(run.cluster),
        variant=printable(run.variant),
        actor=printable(run.actor),
        critic=None if run.critic is None else printable(run.critic),
        source=printable(run.source),
    )


def printable(text: str) -> str:
    """`text` on one line, with escapes for what is no text."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
