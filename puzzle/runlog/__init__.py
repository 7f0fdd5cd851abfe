"""The log of a run: schema, writer and readers. Standard library only."""

from puzzle.runlog.load import load_runs
from puzzle.runlog.run import (
    PROVENANCES,
    STAGES,
    UNFAITHFUL,
    Evaluation,
    Iteration,
    Loaded,
    Report,
    Run,
    RunHeader,
    Switch,
)
from puzzle.runlog.writer import RunWriter

__all__ = [
    "PROVENANCES",
    "STAGES",
    "UNFAITHFUL",
    "Evaluation",
    "Iteration",
    "Loaded",
    "Report",
    "Run",
    "RunHeader",
    "RunWriter",
    "Switch",
    "load_runs",
]
