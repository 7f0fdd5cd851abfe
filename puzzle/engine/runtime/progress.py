"""What a rank does at the moment, as its main thread says; the watchdog publishes it."""

import contextlib
import threading
from collections.abc import Generator


class Progress:
    """What the main thread does, as it says itself. Any thread may `tick`."""

    def __init__(self) -> None:
        self.doing, self.waits = "starting", False
        self.limit = 0.0
        self.count = 0
        self.writing = threading.RLock()
        """Held while something is written that outlasts the run; a verdict takes it and keeps it."""

    def mark(self, doing: str, waits: bool = False) -> None:
        """From now on it does `doing`, which waits for other ranks or does not."""
        self.doing, self.waits = doing, waits
        self.count += 1

    def tick(self) -> None:
        """Something went on."""
        self.count += 1

    @contextlib.contextmanager
    def waiting(self, what: str) -> Generator[None]:
        """What the block does waits for others."""
        before = self.doing, self.waits
        self.mark(f"{before[0]}: {what}", True)
        try:
            yield
        finally:
            self.mark(*before)

    @contextlib.contextmanager
    def busy(self, what: str, limit: float) -> Generator[None]:
        """What the block does computes, and ends by itself after `limit` seconds: so long others wait."""
        before = self.doing
        self.limit = limit
        self.mark(f"{before}: {what}")
        try:
            yield
        finally:
            self.limit = 0.0
            self.mark(before)
