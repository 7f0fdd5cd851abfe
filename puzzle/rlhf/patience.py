"""Waiting for a user's function: it may compute for as long as its limit lets it, and the run says so."""

from __future__ import annotations

import math
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from puzzle.errors import UserError

INTERRUPT = signal.SIGRTMIN + 5
"""Interrupts the main thread when its time is over; a number that nobody else is likely to use."""
AGAIN_SECONDS = 1.0
LAST_RESORT = 5
"""So many interruptions may a function catch before its process ends."""


def end(line: str) -> None:
    """Ends the process with a user error, from any thread."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


@dataclass(frozen=True)
class Patience:
    """`limit` seconds (None: no limit), set by the configuration's `key`; a notice after `notice` seconds,
    then whenever the time has doubled. `give_up` ends the process of a function that catches its end."""

    limit: float | None = None
    notice: float = 60.0
    key: str = "reward.timeout"
    give_up: Callable[[str], None] = end

    @property
    def longest(self) -> float:
        """The limit in seconds, perhaps infinite."""
        return math.inf if self.limit is None else self.limit


class TookTooLong(UserError):
    """The line about a function whose time was over."""


class TimeUp(BaseException):
    """Raised in the function whose time is over."""


@contextmanager
def patience(what: str, allowed: Patience) -> Generator[None]:
    """The block calls `what`. TookTooLong, saying where it was, if that takes longer than is allowed.

    A thread watches. Native code that keeps Python's lock is not ended before it returns.
    """
    watch = _Watch(what, allowed)
    before: Any = None
    interrupts = threading.current_thread() is threading.main_thread()
    if interrupts:
        before = signal.signal(INTERRUPT, watch.interrupt)
    watch.start()
    try:
        yield
    except BaseException:
        # What ends a function whose time is over is not what it was ended for.
        if not watch.expired:
            raise
    finally:
        watch.end()
        if interrupts:
            signal.signal(INTERRUPT, before)
    if watch.expired:
        raise TookTooLong(watch.line)


class _Watch:
    def __init__(self, what: str, allowed: Patience) -> None:
        self.what, self.allowed = what, allowed
        self.line = ""
        self._caller = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="patience", daemon=True)

    @property
    def expired(self) -> bool:
        return bool(self.line)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """The signal's handler; it may come when the block has just ended."""
        if not self._over.is_set():
            raise TimeUp

    def _run(self) -> None:
        began, due, limit = time.monotonic(), self.allowed.notice, self.allowed.longest
        while not self._over.wait(max(0.0, min(due, limit, threading.TIMEOUT_MAX) - _since(began))):
            if _since(began) >= limit:
                break
            if _since(began) >= due:
                end = f"{self.allowed.key}: {limit:g} s" if limit < math.inf else "without limit"
                line = f"{self.what} has computed for {due:g} s{self._place()}; {end}"
                print(line, file=sys.stderr, flush=True)
                due *= 2
        else:
            return
        self.line = (
            f"{self.what} computed for more than {limit:g} s{self._place()};"
            f" make it faster, or raise {self.allowed.key}"
        )
        for _ in range(LAST_RESORT):
            if self._caller == threading.main_thread().ident:
                signal.pthread_kill(self._caller, INTERRUPT)
            if self._over.wait(AGAIN_SECONDS):  # else the function has caught it
                return
        self.allowed.give_up(self.line)

    def _place(self) -> str:
        frame = sys._current_frames().get(self._caller)
        frames = []
        while frame is not None:
            frames.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        found = user_line(reversed(frames))
        return f" ({found})" if found else ""


def _since(began: float) -> float:
    return time.monotonic() - began


def raised_at(trace: TracebackType | None) -> list[tuple[CodeType, int]]:
    """Code and line of every frame of a traceback, the raising one last."""
    found = []
    while trace is not None:
        found.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return found


def user_line(frames: Iterable[tuple[CodeType, int]]) -> str:
    """file:line of the innermost of `frames` (outermost first) in a file that is not Python's, an installed
    package's or this project's; empty where there is none."""
    found = ""
    for code, line in frames:
        path = Path(code.co_filename)
        if path.is_absolute() and not any(path.is_relative_to(place) for place in _FOREIGN):
            found = f"{path}:{line}"
    return found


_FOREIGN = [
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
    Path(__file__).parents[1],
]
