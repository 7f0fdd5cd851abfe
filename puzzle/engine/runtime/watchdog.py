"""Ends a run that hangs without a word, and says who hangs where.

A thread of every rank publishes its sign of life, and what the main thread does, in the store in which the
ranks met; every rank reads all of them and judges by the same rules, under any launcher:

- a rank whose sign of life stopped for N seconds is stopped (SIGSTOP), gone, or holds the interpreter: its
  host's operating system knows, other hosts learn it by `vouch`;
- when all ranks wait for messages or collectives and none has moved for N seconds, they wait for each other;
- a rank that computes may take its time: it is named when others wait and it has not moved for 10 N seconds.

Then all ranks write the stacks of their threads, and end. From the verdict on nothing of the run is written:
what shall outlast it is written under `Progress.writing`, which a verdict takes for good; a stopped rank is
killed as it is, and the stack that it published with its last sign of life is written for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from puzzle.engine.runtime.frames import operation, stack
from puzzle.engine.runtime.progress import Progress

PATIENCE = 10
"""So many times longer than a rank that waits may a rank compute without a mark of progress."""
LAST_RESORT = 3 * PATIENCE
"""So many times longer do collectives wait: their own time-outs know less than the watchdog."""
DUMP = signal.SIGUSR2
DUMP_SECONDS = 3.0
JOIN_SECONDS = 5.0
VERDICT = "verdict"


@dataclass(frozen=True)
class Watch:
    """N in seconds; `report(line, first)` shows the verdict, on every rank, `first` on one.

    `folder` receives the stacks, as rank-NNN.txt.
    """

    seconds: float
    report: Callable[[str, bool], None]
    folder: Path
    longest: float = 0.0
    """Seconds that one rank may compute alone, by its own account (`Progress.busy`); infinity: no end."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes: `beat` counts signs, `moves` counts changes of what it does; `limit` is
    `Progress.busy`'s."""

    rank: int
    host: str
    pid: int
    beat: int = 0
    moves: int = 0
    doing: str = ""
    waits: bool = False
    limit: float = 0.0
    over: bool = False
    dumped: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} on {self.host}"


@dataclass
class PeerState:
    """A rank's last sign, and when its beat and its moves last changed (seconds of this process's clock)."""

    sign: Heartbeat
    beat_at: float
    moved_at: float

    def update(self, sign: Heartbeat, now: float) -> None:
        """Take a newer sign in."""
        if sign.beat != self.sign.beat:
            self.beat_at = now
        if (sign.moves, sign.waits) != (self.sign.moves, self.sign.waits):
            self.moved_at = now
        self.sign = sign


@dataclass(frozen=True)
class Verdict:
    """One line, and the ranks that show no sign of life."""

    line: str
    silent: tuple[int, ...] = field(default=())


def judge(
    seen: Sequence[PeerState], now: float, seconds: float, state: Callable[[Heartbeat], str]
) -> Verdict | None:
    """Whether the run hangs; `state` says in words what the operating system knows of a silent rank."""
    here = [s for s in seen if not s.sign.over]
    silent = [s for s in here if now - s.beat_at >= seconds]
    known = {s.sign.rank: state(s.sign) for s in silent}
    lost = [s for s in silent if now - s.beat_at >= _silence(s.sign, known[s.sign.rank], seconds)]
    if lost:
        first = max(lost, key=lambda s: now - s.beat_at)
        line = f"{first.sign.name} {known[first.sign.rank]}: no sign of life for {now - first.beat_at:.0f} s"
        line += f", last in {first.sign.doing}{_others(here, first, now)}"
        return Verdict(line, tuple(s.sign.rank for s in lost))
    still = now - max((s.moved_at for s in here), default=now)
    waiting = [s for s in here if s.sign.waits and s not in silent]
    if not waiting or still < seconds:
        return None
    busy = [s for s in here if s not in waiting]
    if busy and still < max(_patience(s.sign, seconds) for s in busy):
        return None
    first = min(busy or waiting, key=lambda s: s.moved_at)
    what = "has computed without progress" if busy else "has waited"
    line = f"{first.sign.name} {what} for {now - first.moved_at:.0f} s in {first.sign.doing}"
    remedy = "; if it needs longer, raise launch.watchdog" if busy else ""
    return Verdict(line + _others(here, first, now) + remedy, tuple(s.sign.rank for s in silent))


def _patience(sign: Heartbeat, seconds: float) -> float:
    """How long a rank may compute while others wait: its own limit ends it first."""
    return PATIENCE * seconds + sign.limit


def _silence(sign: Heartbeat, state: str, seconds: float) -> float:
    """How long a rank of which the system knows `state` may give no sign."""
    return {BUSY: math.inf, AWAY: _patience(sign, seconds)}.get(state, seconds)


def _others(here: Sequence[PeerState], first: PeerState, now: float, most: int = 3) -> str:
    waiting = [s for s in here if s is not first and s.sign.waits]
    told = [f"{s.sign.name} waits in {s.sign.doing} ({now - s.moved_at:.0f} s)" for s in waiting[:most]]
    if len(waiting) > most:
        told.append(f"{len(waiting) - most} more wait")
    return "".join(f"; {text}" for text in told)


BUSY = "holds its interpreter"
AWAY = "does not answer"
"""On another host, of which nobody says more: it may compute or be gone."""
STOPPED = "is stopped (SIGSTOP, or a debugger)"


def process_state(sign: Heartbeat) -> str:
    """What has become of a process that shows no sign of life."""
    if sign.host != socket.gethostname():
        return AWAY
    try:
        stat = Path(f"/proc/{sign.pid}/stat").read_text()
    except OSError:
        return "is gone"
    letter = stat.rpartition(")")[2].split()[0]
    if letter in "Tt":
        return STOPPED
    return "is gone" if letter in "ZX" else BUSY


class Watchdog:
    """The thread that watches; made after the ranks have met, ended by `stop`."""

    def __init__(
        self, watch: Watch, rank: int, size: int, progress: Progress, moved: Mapping[str, int]
    ) -> None:
        """`moved` counts bytes, by kind: where they change, the rank moves."""
        self.watch, self.size, self.progress, self.moved = watch, size, progress, moved
        self.interval = min(2.0, watch.seconds / 20)
        self.sign = Heartbeat(rank, socket.gethostname(), os.getpid())
        self._main = threading.main_thread().ident
        self._store = _own_store(watch.seconds)
        self._stacks, self._new = _stack_file(watch.folder, rank)
        # Chained to what the signal does by default: who is told to write its stacks does nothing afterwards.
        faulthandler.register(DUMP, file=self._stacks, all_threads=True, chain=True)
        self._key: Any = None
        self._seen: dict[int, PeerState] = {}
        self._known: set[str] = set()
        self._done = threading.Event()
        self._leaving = False
        self._rounds = 0
        self._publish()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._guard)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """This rank will soon `stop`: from now on the store may end at any time."""
        self._leaving = True

    def stop(self, over: bool) -> None:
        """No more watching. `over` says that this rank ends well: nobody misses it."""
        self._done.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if over:
            with contextlib.suppress(dist.DistError):  # whoever held the store has ended already
                self._publish(over=True)
        faulthandler.unregister(DUMP)
        self._stacks.close()
        path = Path(self._stacks.name)
        if self._new and path.stat().st_size == 0:
            path.unlink()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(self.interval):
            now = time.monotonic()
            if now - last > self.watch.seconds / 2:
                self._seen.clear()  # this process itself stood still: what it knows of others is old
            last = now
            try:
                self._publish()
                verdict = self._look(now)
                if verdict is not None:
                    self._end(verdict)
            except dist.DistError as error:
                if not self._leaving:
                    self._end_alone(f": {str(error).splitlines()[0]}")
                return
            self._rounds += 1

    def _guard(self) -> None:
        """Ends the process when the other thread gets no answer from the store, which knows no time-out."""
        rounds, still = -1, 0
        while not self._done.wait(self.interval):
            rounds, still = self._rounds, still + 1 if rounds == self._rounds else 0
            if still * self.interval >= self.watch.seconds and not self._leaving:
                self._end_alone(f" for {self.watch.seconds:g} s")

    def _publish(self, over: bool = False, dumped: bool = False) -> None:
        doing, waits = self.progress.doing, self.progress.waits
        frame = sys._current_frames().get(self._main or 0)
        found = operation(frame)
        if found is not None:
            doing, waits = f"{doing}: {found}", True
        key = (self.progress.count, doing, waits, sum(list(self.moved.values())))
        moves = self.sign.moves + (key != self._key)
        self._key = key
        self.sign = replace(
            self.sign,
            beat=self.sign.beat + 1,
            moves=moves,
            doing=doing,
            waits=waits,
            limit=self.progress.limit,
            over=over,
            dumped=dumped,
        )
        self._store.set(f"stack/{self.sign.rank}", stack(frame))
        self._store.set(str(self.sign.rank), json.dumps(asdict(self.sign)))

    def _look(self, now: float) -> Verdict | None:
        """Read all signs; the verdict of this rank or of one that was faster."""
        if self._store.check([VERDICT]):
            found = json.loads(self._store.get(VERDICT))
            return Verdict(found["line"], tuple(found["silent"]))
        for sign in self._signs():
            if sign.rank in self._seen:
                self._seen[sign.rank].update(sign, now)
            else:
                self._seen[sign.rank] = PeerState(sign, now, now)
        return judge(list(self._seen.values()), now, self.watch.seconds, self._state)

    def _state(self, sign: Heartbeat) -> str:
        key = f"state/{sign.rank}"
        if sign.host != self.sign.host and self._store.check([key]):
            return self._store.get(key).decode()
        return process_state(sign)

    def _signs(self) -> list[Heartbeat]:
        keys = [key for key in map(str, range(self.size)) if key in self._known or self._store.check([key])]
        self._known.update(keys)
        return [Heartbeat(**json.loads(text)) for text in self._store.multi_get(keys)]

    def _end(self, verdict: Verdict) -> None:
        """Stacks of all ranks, the line, the end of this process."""
        self.progress.writing.acquire(timeout=DUMP_SECONDS)  # or its holder waits for a disk for ever
        own = json.dumps({"by": self.sign.rank, **asdict(verdict)})
        said = json.loads(self._store.compare_set(VERDICT, "", own))
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        # Before anybody dies: a launcher would take the death of a stopped rank for the cause, and end all.
        self.watch.report(said["line"], said["by"] == self.sign.rank)
        silent = [s.sign for s in self._seen.values() if s.sign.rank in said["silent"]]
        mine = [s for s in silent if s.host == self.sign.host and process_state(s) != "is gone"]
        for sign in mine:
            if process_state(sign) == STOPPED:
                self._leave_stack(sign)
                _kill(sign.pid, signal.SIGKILL)
            else:
                _kill(sign.pid, DUMP)
        self._publish(dumped=True)
        deadline = time.monotonic() + max(DUMP_SECONDS, self.watch.seconds)
        while time.monotonic() < deadline:
            signs = self._signs()
            if all(s.dumped or s.over or s.rank in said["silent"] for s in signs):
                break
            time.sleep(self.interval)
        for sign in mine:
            _kill(sign.pid, signal.SIGKILL)
        os._exit(1)

    def _leave_stack(self, sign: Heartbeat) -> None:
        """Write the last known stack of a stopped rank into its file, unless another rank does."""
        own = str(self.sign.rank)
        if self._store.compare_set(f"left/{sign.rank}", "", own) == own.encode():
            text = self._store.get(f"stack/{sign.rank}").decode()
            head = f"{sign.name} was stopped; at its last sign of life (most recent call first):"
            with (self.watch.folder / f"rank-{sign.rank:03d}.txt").open("a") as file:
                file.write(f"{head}\n{text}")

    def _end_alone(self, how: str) -> None:
        """Whoever holds the store, the launcher or rank 0, cannot tell the others."""
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        line = f"the run's store at {place} does not answer {self.sign.name}{how}; is its process stopped?"
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self.watch.report(line, True)
        for seen in self._seen.values():
            if seen.sign.host == self.sign.host and process_state(seen.sign) == STOPPED:
                _kill(seen.sign.pid, signal.SIGKILL)
        os._exit(1)


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _own_store(seconds: float) -> dist.Store:
    """A connection of its own to the store in which the ranks met: the main thread may wait in the other."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=limit)
    return _of_signs(store)


def _of_signs(store: dist.Store) -> dist.Store:
    # torchrun's agents keep their store when they start the ranks anew.
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def vouch(store: dist.Store, ranks: Sequence[int]) -> None:
    """Tell other hosts what the system knows of this host's `ranks`; for who is none of them and sees all."""
    signs = _of_signs(store)
    for rank in ranks:
        if signs.check([str(rank)]):
            sign = Heartbeat(**json.loads(signs.get(str(rank))))
            signs.set(f"state/{rank}", process_state(sign))


def _stack_file(folder: Path, rank: int) -> tuple[TextIO, bool]:
    """Where stacks go, and whether the file is new: a launcher may have put the rank's output there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:03d}.txt"
    new = not path.exists()
    return path.open("a"), new
