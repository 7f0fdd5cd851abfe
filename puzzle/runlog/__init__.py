"""The log of a run: schema, writer and readers. Standard library only.

A run's log is records, each of a class of `puzzle.runlog.records`: `writer.write(Switch(...))` adds one,
`run.of(Switch)` gives them back.
"""

from puzzle.runlog.load import load_runs
from puzzle.runlog.records import NO_HYBRID_ENGINE, PROVENANCES, STAGES, UNFAITHFUL, RunHeader
from puzzle.runlog.run import Loaded, Report, Run
from puzzle.runlog.writer import RunWriter

__all__ = [
    "NO_HYBRID_ENGINE",
    "PROVENANCES",
    "STAGES",
    "UNFAITHFUL",
    "Loaded",
    "Report",
    "Run",
    "RunHeader",
    "RunWriter",
    "load_runs",
]
