"""A run on several hosts: one agent per host runs its share of the ranks, the launcher's process watches.

Ray and Slurm only start agents (`puzzle.launch.agent`) and hand each the order; what agents tell comes
through the store in which the ranks meet, which the launcher's process holds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle.errors import UserError
from puzzle.launch.deaths import Death, first_of
from puzzle.launch.local import WorkerError, raise_death
from puzzle.launch.network import address_towards, listen

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0
END, FAILED, STOPPED = "end", "failed", "stopped"  # a key and what it says: why agents shall end
OVER = "over"  # the last beat


@dataclass(frozen=True)
class Order:
    """What every agent is told: `counts[i]` processes on `hosts[i]` run target(*args); args are JSON values.

    The ranks meet at address:port. `logs` is the folder for the output of all ranks but the first.
    """

    target: str
    args: list[Any]
    hosts: list[str]
    counts: list[int]
    address: str
    port: int
    logs: str | None

    def text(self) -> str:
        """One line."""
        return json.dumps(asdict(self)) + "\n"


def filled(world: int, room: Sequence[int]) -> list[int]:
    """`world` processes on hosts with so much `room`, filled in order; UserError if they do not fit."""
    counts: list[int] = []
    for places in room:
        if (left := world - sum(counts)) == 0:
            break
        counts.append(min(places, left))
    if sum(counts) < world:
        raise UserError(
            f"the run wants {world} devices and there are {sum(room)}; shrink layout.tp, pp or dp"
        )
    return counts


class AgentMonitor:
    """The launcher's side of a run on several hosts. Posts are JSON, read only to be shown."""

    def __init__(self, hosts: Sequence[str], counts: Sequence[int], addresses: Sequence[str]) -> None:
        """`addresses` of the hosts decide on which interface of this host the ranks meet."""
        self._hosts, self._counts = list(hosts), list(counts)
        self._address = address_towards(addresses)
        self._store = listen(self._address)
        self._deaths: dict[int, Death] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}  # host -> its last beat and when that was new

    def order(self, target: str, args: Sequence[Any], logs: Path | None) -> Order:
        """The order for the agents of this run."""
        folder = None if logs is None else str(logs.resolve())
        counts, hosts = self._counts, self._hosts
        return Order(target, list(args), hosts, counts, self._address, self._store.port, folder)

    def until(self, ended: Callable[[float], bool], grace: float = 10.0) -> None:
        """Wait until `ended(seconds)`, but only `grace` seconds more once all agents are over, or after a
        death, when agents are told to end."""
        deadline = math.inf
        over = False
        while not over and time.monotonic() < deadline:
            over = ended(BEAT_SECONDS)
            self._read_posts()
            if not over:
                # After a death, a host that is silent for a while is its likely cause.
                self._find_silent(SILENT_SECONDS if deadline == math.inf else grace / 2)
            if deadline == math.inf and (self._deaths or self._all_over()):
                self.end(FAILED)  # which those that are over do not hear
                deadline = time.monotonic() + grace

    def end(self, why: str) -> None:
        """Tell all agents to end their processes because the run FAILED, or was STOPPED."""
        self._store.set(END, why)

    def lose(self, index: int, why: str, code: int = 1) -> None:
        """Count the host as lost."""
        rank = sum(self._counts[:index])
        self._deaths.setdefault(index, Death(rank, "signal", why, code, time.time()))

    def find_mute(self) -> None:
        """Lose hosts whose agents have begun and ended without a word, unless all have."""
        self._read_posts()
        beats = [self._beat(index) for index in range(len(self._hosts))]
        if OVER.encode() in beats:
            for index, beat in enumerate(beats):
                if beat not in (b"", OVER.encode()):
                    self.lose(index, "its agent was killed", 137)

    def settle(self, code: int, why: str, logs: Path | None) -> None:
        """Return if all went well; else raise the first death's error, or one for `code` and why that is."""
        first = first_of(list(self._deaths.values()))
        if first is not None:
            index = next(i for i in range(len(self._counts)) if first.rank < sum(self._counts[: i + 1]))
            raise_death(first, self._hosts[index], logs)
        if code:
            raise WorkerError(f"the run on {', '.join(self._hosts)} ended: {why}", code)

    def _all_over(self) -> bool:
        last = {index: beat for index, (beat, _) in self._heard.items()}
        return all(last.get(index) == OVER.encode() for index in range(len(self._hosts)))

    def _read_posts(self) -> None:
        for index in range(len(self._hosts)):
            key = f"death/{index}"
            if index not in self._deaths and self._store.check([key]):
                self._deaths[index] = Death(**json.loads(self._store.get(key)))

    def _beat(self, index: int) -> bytes:
        key = f"beat/{index}"
        return self._store.get(key) if self._store.check([key]) else b""

    def _find_silent(self, limit: float) -> None:
        """Lose hosts whose beat stopped, or did not begin although another's did."""
        now = time.monotonic()
        for index in range(len(self._hosts)):
            beat = self._beat(index)
            last, when = self._heard.get(index, (None, now))
            if beat != last:
                if beat or self._heard:
                    self._heard[index] = (beat, now)
            elif beat != OVER.encode() and now - when > limit:
                self.lose(index, f"its host is silent for {limit:g} s and counts as lost")
