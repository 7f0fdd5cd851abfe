"""Why ranks of this host ended, and which of several deaths is the cause of the others."""

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from puzzle.errors import TERMINATED
from puzzle.launch import fork_server

DONE = "done"
"""What a worker reports at the end of its work: who ends without it has failed, whatever its exit code."""


@dataclass(frozen=True)
class Death:
    """Why a worker ended: `kind` is user, hang, signal, exit (of itself, without a word) or error; `when` is
    the host's clock in seconds. `trace` is for programmers, where there is no file for it.
    """

    rank: int
    kind: str
    line: str
    code: int
    when: float
    trace: str = ""


def death_of(rank: int, worker: Any, report: Connection) -> Death | None:
    """Why a worker ended, or is about to; None for one that runs on or has done its work."""
    kind = ""
    code = -signal.SIGTERM if worker.exitcode == TERMINATED else worker.exitcode  # see `leave`
    if report.poll():
        with contextlib.suppress(EOFError):
            when, kind, line, trace = report.recv()
            if kind != DONE:
                return Death(rank, kind, line, 2 if kind == "user" else 1, when, trace)
    if code is None or (code == 0 and kind == DONE):
        return None
    if code < 0:
        return Death(rank, "signal", _killed(-code), 128 - code, time.time())
    when = "after" if kind == DONE else "before"
    line = f"ended with exit code {code} {when} its work was done (os._exit, as a reward may call it)"
    return Death(rank, "exit", line, code or 1, time.time())


def causes(workers: Sequence[Any], reports: Sequence[Connection], first: int) -> list[Death]:
    """What workers have told that follows from no other's death."""
    told = (n for n, report in enumerate(reports) if not report.closed)
    deaths = (death_of(first + n, workers[n], reports[n]) for n in told)
    return [death for death in deaths if death is not None and death.kind in ("user", "hang")]


def server_death(rank: int, patience: float = 0.0) -> Death | None:
    """The death of the fork server, told as that of the first rank: nobody hears of its ranks any more."""
    code = fork_server.ended(patience)
    if code is None:
        return None
    how = _killed(-code) if code < 0 else f"ended with exit code {code}"
    return Death(rank, "signal", f"its fork server was {how}", 128 + abs(code), time.time())


def _killed(number: int) -> str:
    name = signal.Signals(number).name
    hints = {"SIGKILL": " (out of memory, or by hand)", "SIGTERM": " (by hand, or a scheduler)"}
    return f"killed by {name}{hints.get(name, '')}"


def first_of(deaths: Sequence[Death | None]) -> Death | None:
    """The cause among deaths: user errors, hangs (which end all), signals (an abort may follow a lost peer),
    exits without a word (who loses a peer has one to say), then by time."""
    order = {"user": 0, "hang": 1, "signal": 2, "exit": 3, "error": 4}

    def key(death: Death) -> tuple[int, float]:
        follows = death.kind == "signal" and death.code == 128 + signal.SIGABRT
        return (5 if follows else order[death.kind], death.when)

    return min((death for death in deaths if death is not None), key=key, default=None)
