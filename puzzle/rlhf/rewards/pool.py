"""Processes that call a reward function beside the trainer, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.connection import wait

from puzzle.errors import UserError
from puzzle.launch.local import REPORT
from puzzle.rlhf.patience import AGAIN_SECONDS, LAST_RESORT
from puzzle.rlhf.rewards.batch import Arriving, RewardBatch
from puzzle.rlhf.rewards.scores import shown
from puzzle.rlhf.rewards.signature import Parameters
from puzzle.rlhf.rewards.worker import CLOSED, MAIN, Answer, Setup, Task

GRACE_SECONDS = (LAST_RESORT + 2) * AGAIN_SECONDS
"""So much longer than its function may compute is a worker waited for: it ends the function itself."""
SETTLE_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """Seconds (None: no limit) for a batch and for a response, and until the run speaks of a batch;
    `late_score` is what a response scores that took too long, None where that ends the run."""

    batch: float | None = None
    response: float | None = None
    notice: float = 60.0
    late_score: float | None = None


class Worker:
    """One process. It answers its setup, then what is sent to it, in order, or it dies."""

    def __init__(self, setup: Setup) -> None:
        """Start it; its first answer says what the function takes."""
        ours, theirs = multiprocessing.Pipe()
        descriptors = [theirs.fileno(), _stderr()]
        environment = {name: value for name, value in os.environ.items() if name != REPORT}
        command = [sys.executable, "-P", "-c", MAIN, json.dumps([sys.path, descriptors])]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.connection = ours
        self.ended = os.pidfd_open(self.pid)
        """Readable when the process is over, whoever inherited its pipes."""
        self.ready = False
        """Whether it has answered its setup."""
        self.task: Task | None = None
        self.began = time.monotonic()
        self._send(setup)

    def give(self, task: Task) -> None:
        """A task; that the process has died meanwhile shows at the answer."""
        self.task, self.began = task, time.monotonic()
        self._send(task)

    def _send(self, what: Setup | Task) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(what)

    def answer(self) -> Answer | None:
        """What it has answered; None where it ended without."""
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll():
                return self.connection.recv()
        return None

    def end(self, settle: float = 0.0) -> int:
        """End it, after `settle` seconds in which it may end by itself; its exit code, negative for a
        signal."""
        try:
            code = self._process.wait(settle)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        os.close(self.ended)
        self.connection.close()
        return code


def _stderr() -> int:
    """Where this process talks to people; 2 where that is no file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


class _Work:
    """A batch while it is scored: tasks that nobody has, processes that have one, scores by first row.
    `began` is when the whole batch was there, None before; people hear of it again at `due`."""

    def __init__(self, source: RewardBatch | Arriving, notice: float) -> None:
        self.arriving = source if isinstance(source, Arriving) else None
        self.todo = deque[Task]() if isinstance(source, Arriving) else deque([Task(source)])
        self.count = source.count if isinstance(source, Arriving) else len(source)
        self.busy: list[Worker] = []
        self.scores: dict[int, list[float]] = {}
        self.began, self.due, self._notice = None if self.arriving else time.monotonic(), math.inf, notice

    @property
    def over(self) -> bool:
        """Whether all is scored."""
        return not self.todo and not self.busy and (self.arriving is None or self.arriving.over)

    def take(self) -> None:
        """Make tasks of the responses that have come."""
        if self.arriving is None or self.began is not None:
            return
        self.began = self.arriving.whole_at
        self.due = math.inf if self.began is None else self.began + self._notice
        self.todo += [Task(one, row, self.count) for row, one in self.arriving.ready()]


class PoolReward:
    """A reward function in processes of its own: whole batches in one, or single responses in several."""

    def __init__(self, setup: Setup, workers: int | None, limits: Limits) -> None:
        """Without `workers`, a call has the whole batch."""
        self.name, self.what = setup.name, f"reward.function {setup.name}"
        self._setup, self._limits, self.each = setup, limits, workers is not None
        self._most = workers or 1
        self._workers: list[Worker] = []
        self._parameters: Parameters | None = None

    @property
    def parameters(self) -> Parameters:
        """What the function takes; starts the first process. UserError where the function cannot be had."""
        if self._parameters is None:
            worker = self._start()
            limit = self._limits.batch
            try:
                if not wait([worker.connection, worker.ended], limit):
                    raise UserError(f"{self.what}: its import computed for more than {limit:g} s")
                self._take_setup(worker, worker.answer())
            except BaseException:
                self.close()
                raise
        assert self._parameters is not None
        return self._parameters

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """Which columns of a source it reads; UserError for a parameter that is none."""
        return self.parameters.columns(names, source)

    @property
    def pids(self) -> list[int]:
        """Of the processes that live."""
        return [worker.pid for worker in self._workers]

    def score(self, batch: RewardBatch) -> list[float]:
        """Scores, one per response, whichever process found them. UserError with one line that names the
        function and, where it is called for each, the response."""
        if not self.each:
            return self._scores(_Work(batch, self._limits.notice))
        arriving = Arriving(len(batch))
        for row in range(len(batch)):
            arriving.put(row, batch.row(row))
        return self.score_each(arriving)

    def score_each(self, arriving: Arriving) -> list[float]:
        """The same of responses as they come; the batch's time begins with the last one."""
        return self._scores(_Work(arriving, self._limits.notice))

    def _scores(self, work: _Work) -> list[float]:
        try:
            while not work.over:
                self._step(work)
        except BaseException:
            self.close()
            raise
        return [score for first in sorted(work.scores) for score in work.scores[first]]

    def close(self) -> None:
        """End all processes."""
        while self._workers:
            self._workers.pop().end()

    def _start(self) -> Worker:
        self._workers.append(Worker(self._setup))
        return self._workers[-1]

    def _step(self, work: _Work) -> None:
        """Give out tasks, wait until something happens, and take what was answered."""
        work.take()
        self._assign(work)
        limit, notice, coming = math.inf, work.due, list[int]()
        if work.arriving is not None:  # a call with the whole batch says itself where it is
            if work.began is None:
                coming = [work.arriving.fileno()]
            else:
                limit = work.began + _seconds(self._limits.batch)
        until = min([limit, notice, *map(self._deadline, work.busy)])
        timeout = None if until == math.inf else max(0.0, until - time.monotonic())
        ready = wait([*coming, *(end for w in work.busy for end in (w.connection, w.ended))], timeout)
        for worker in [w for w in work.busy if w.connection in ready or w.ended in ready]:
            self._take(worker, work)
        now = time.monotonic()
        for worker in [w for w in work.busy if now >= self._deadline(w)]:
            self._end_late(worker, work)
        if work.busy and now >= limit:
            raise UserError(
                f"{self.what} computed for more than {self._limits.batch:g} s ({len(work.scores)} of"
                f" {work.count} responses); make it faster, give more reward.workers, or raise reward.timeout"
            )
        if work.busy and work.began is not None and now >= notice:
            ends = "without limit" if limit == math.inf else f"reward.timeout: {self._limits.batch:g} s"
            said = f"has computed for {now - work.began:.0f} s ({len(work.scores)} of {work.count} responses)"
            print(f"{self.what} {said}; {ends}", file=sys.stderr, flush=True)
            work.due += now - work.began

    def _assign(self, work: _Work) -> None:
        idle = [worker for worker in self._workers if worker not in work.busy]
        while work.todo and (idle or len(self._workers) < self._most):
            worker = idle.pop() if idle else self._start()
            worker.give(work.todo.popleft())
            work.busy.append(worker)

    def _deadline(self, worker: Worker) -> float:
        """When a process is ended that has not ended its function."""
        limit = self._limits.response if self.each and worker.ready else self._limits.batch
        return worker.began + _seconds(limit) + GRACE_SECONDS

    def _take(self, worker: Worker, work: _Work) -> None:
        answer = worker.answer()
        if not worker.ready:
            self._take_setup(worker, answer)
            return
        assert worker.task is not None
        if answer is None:
            self._workers.remove(worker)
            code = worker.end(SETTLE_SECONDS)
            raise UserError(f"{self.what}{_at(worker.task)} {_ended(code)}")
        if answer.late:
            self._late(worker, work, answer.error, gone=answer.leaves)
        elif answer.error:
            raise UserError(answer.error)
        else:
            self._done(worker, work, answer.found)

    def _take_setup(self, worker: Worker, answer: Answer | None) -> None:
        if answer is None:
            self._workers.remove(worker)
            raise UserError(f"{self.what}: its import {_ended(worker.end(SETTLE_SECONDS))}")
        if answer.error:
            raise UserError(answer.error)
        self._parameters = answer.found
        worker.ready, worker.began = True, time.monotonic()

    def _end_late(self, worker: Worker, work: _Work) -> None:
        """End a process whose function does not let itself be ended."""
        if not worker.ready:
            raise UserError(f"{self.what}: its import computed for more than {self._limits.batch:g} s")
        limit, key = (
            (self._limits.response, "response_timeout") if self.each else (self._limits.batch, "timeout")
        )
        assert worker.task is not None
        line = f"{self.what}{_at(worker.task)} computed for more than {limit:g} s; make it faster, or raise"
        self._late(worker, work, f"{line} reward.{key}", gone=True)

    def _late(self, worker: Worker, work: _Work, line: str, gone: bool) -> None:
        if self._limits.late_score is None or not self.each:
            raise UserError(line)
        print(f"{line}; it scores {self._limits.late_score:g}", file=sys.stderr, flush=True)
        self._done(worker, work, [self._limits.late_score])
        if gone:
            self._workers.remove(worker)
            worker.end()

    def _done(self, worker: Worker, work: _Work, scores: list[float]) -> None:
        assert worker.task is not None
        work.scores[worker.task.first] = scores
        worker.task = None
        work.busy.remove(worker)


def _seconds(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _at(task: Task) -> str:
    """Which response a task is about; nothing for a whole batch."""
    return f" at response {task.first + 1} of {task.of} ({shown(task.batch.responses[0])})" if task.of else ""


def _ended(code: int) -> str:
    if code == CLOSED:
        return "closed the file descriptors of its process"
    if code >= 0:
        return f"ended the process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"ended by {name}{why}"
