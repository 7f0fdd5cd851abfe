"""A process that scores: it imports one reward function and answers what its pool sends."""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from puzzle.errors import UserError
from puzzle.rlhf.patience import Patience, TookTooLong
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.functions import FunctionReward

CLOSED = 87
"""The exit code of a worker that cannot answer: its function closed what it answers by."""
MAIN = (
    "import json, sys; sys.path[:], descriptors = json.loads(sys.argv[1]); del sys.argv[1:];"
    "from puzzle.rlhf.rewards.worker import main; main(*descriptors)"
)
"""What the interpreter of a worker runs. It does not import the program that started the run again."""


@dataclass(frozen=True)
class Setup:
    """Which function: by its name, or as `pickled` by the module `by`; how long a call may take."""

    name: str
    limit: float | None
    notice: float
    key: str
    pickled: bytes | None = None
    by: str = "dill"


@dataclass(frozen=True)
class Task:
    """Responses to score, of a batch of `of` those from number `first`; `of` is 0 for the whole batch."""

    batch: RewardBatch
    first: int = 0
    of: int = 0


@dataclass(frozen=True)
class Answer:
    """What a worker found: its function's parameters or scores, or the line of an error; `late` is one about
    time, and it `leaves` where the function would not be ended."""

    found: Any = None
    error: str = ""
    late: bool = False
    leaves: bool = False


def main(descriptor: int, people: int) -> None:
    """Answer until the other side of the connection is gone: then end at once, whatever the function does.
    What Python says goes to the descriptor `people`, as that of the trainer does."""
    if people != 2:
        sys.stderr = os.fdopen(people, "w", buffering=1, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends this process
    connection, own, place = Connection(descriptor), os.getpid(), _place(descriptor)
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, asked), daemon=True).start()

    setup: Setup = asked.get()

    def answer(what: Answer) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if os.getpid() != own:  # its parent answers
            said = f"note: reward.function {setup.name} forked, and the child came back: it ends here"
            print(said, file=sys.stderr, flush=True)
            os._exit(0)
        if _place(descriptor) != place:
            os._exit(CLOSED)
        try:
            connection.send(what)
        except OSError:
            os._exit(CLOSED)

    def give_up(line: str) -> None:
        answer(Answer(error=line, late=True, leaves=True))
        os._exit(2)

    allowed = Patience(setup.limit, setup.notice, setup.key, give_up)
    try:
        reward = FunctionReward(setup.name, allowed, _unpickled(setup))
    except UserError as error:
        answer(Answer(error=str(error)))
        return
    answer(Answer(reward.parameters))
    while True:
        task: Task = asked.get()
        try:
            found = Answer(reward.score(task.batch, task.first, task.of))
        except TookTooLong as error:
            found = Answer(error=str(error), late=True)
        except UserError as error:
            found = Answer(error=str(error))
        answer(found)


def _unpickled(setup: Setup) -> Any:
    if setup.pickled is None:
        return None
    try:
        return importlib.import_module(setup.by).loads(setup.pickled)
    except Exception as error:  # noqa: BLE001 - whatever a user's object does when it is made anew
        raise UserError(f"reward.function {setup.name}: it cannot be unpickled: {error!r}") from None


def _place(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read(connection: Connection, asked: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            asked.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)
