"""The log of a run: schema, writer and readers. Standard library only."""

from puzzle.runlog.run import PROVENANCES, STAGES, Iteration, Loaded, Report, Run, Switch

__all__ = ["PROVENANCES", "STAGES", "Iteration", "Loaded", "Report", "Run", "Switch"]
