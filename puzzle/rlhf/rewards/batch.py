"""What rewards are given of an iteration's responses."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARGUMENTS = ("prompts", "responses", "response_ids", "messages", "ids", "finished")
"""What a reward may ask for beside the columns of the data, which go by their own names."""


@dataclass(frozen=True)
class RewardBatch:
    """Lists with one entry per response: the texts of prompt and response, the response's token ids, the
    prompt's turns (None for plain text) and id, whether the response came to its end, and the prompt's
    columns."""

    prompts: list[str]
    responses: list[str]
    response_ids: list[list[int]]
    messages: list[list[Mapping[str, str]] | None]
    ids: list[str]
    finished: list[bool]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Responses."""
        return len(self.responses)

    def row(self, row: int) -> RewardBatch:
        """The batch of one response."""
        parts = [getattr(self, name)[row : row + 1] for name in ARGUMENTS]
        return RewardBatch(*parts, {name: values[row : row + 1] for name, values in self.columns.items()})

    def argument(self, name: str) -> list[Any]:
        """The list of one name; those of `ARGUMENTS` hide columns of the same name. KeyError for none."""
        return list(getattr(self, name) if name in ARGUMENTS else self.columns[name])

    @property
    def names(self) -> tuple[str, ...]:
        """All that `argument` knows."""
        return (*ARGUMENTS, *(name for name in self.columns if name not in ARGUMENTS))


class Arriving:
    """The `count` responses of a batch that come one after the other, each as a batch of one with its row.

    One thread or several take them: by `get`, which waits, or by `ready` when `fileno` is readable.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.first_at: float | None = None
        """When the first one came (of `time.perf_counter`)."""
        self.whole_at: float | None = None
        """When the last one came (of `time.monotonic`)."""
        self._seen: set[int] = set()
        self._here: deque[tuple[int, RewardBatch]] = deque()
        self._given, self._stopped = 0, False
        self._changed = threading.Condition()
        self._signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, row: int, one: RewardBatch) -> None:
        """A response has come; one that is known is left."""
        with self._changed:
            if row in self._seen:
                return
            self._seen.add(row)
            self._here.append((row, one))
            self.first_at = time.perf_counter() if self.first_at is None else self.first_at
            if len(self._seen) == self.count:
                self.whole_at = time.monotonic()
            self._changed.notify_all()
        os.eventfd_write(self._signal, 1)

    def get(self) -> tuple[int, RewardBatch] | None:
        """The next one; None once all have been given out, or after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._here or self._stopped or self.over)
            if self._stopped or not self._here:
                return None
            self._given += 1
            if self.over:
                self._changed.notify_all()
            return self._here.popleft()

    def ready(self) -> list[tuple[int, RewardBatch]]:
        """Those that have come and are nobody's yet."""
        with self._changed, contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._signal)
        with self._changed:
            found = list(self._here)
            self._here.clear()
            self._given += len(found)
        return found

    @property
    def over(self) -> bool:
        """Whether all have been given out."""
        return self._given == self.count

    def stop(self) -> None:
        """Nobody gets any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def fileno(self) -> int:
        """Readable when some have come."""
        return self._signal

    def __del__(self) -> None:
        """The descriptor ends with its last user."""
        os.close(self._signal)
