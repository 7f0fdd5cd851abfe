"""Reads the log of a run while it is being written."""

from collections.abc import Iterator
from pathlib import Path

from puzzle.runlog.record import BadLine, Record, decode


class Follower:
    """Gives the records that have been added to a log since it was asked last, the first time since it was
    made. The log need not exist yet. What cannot be read is left to the readers of the whole log."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.exists() else 0

    def new(self) -> Iterator[Record]:
        """The records of whole lines; a line that is being written waits for the next time."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in filter(bytes.strip, whole.split(b"\n")):
            try:
                yield decode(line).record
            except BadLine:
                continue
