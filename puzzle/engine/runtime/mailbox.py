"""Messages of any rank to one that reads them, of which no other rank has to know when."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

TAKE_SECONDS = 60.0


class Mailbox:
    """Messages in the store in which the ranks met, in the order in which they came. Many post, one takes."""

    def __init__(self, purpose: str) -> None:
        """A connection of its own: who takes may wait in it. The store's place is torchrun's variables."""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=TAKE_SECONDS)
        store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=limit)
        # torchrun's agents keep their store when they start the ranks anew.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"{purpose}/{again}", store)
        self._taken = 0

    def post(self, message: str) -> None:
        """Leave a message; nobody is waited for."""
        number = self._store.add("posted", 1)
        self._store.set(f"message/{number}", message)

    def take(self) -> str:
        """The next message, however long it takes to come."""
        key = f"message/{self._taken + 1}"
        while True:
            try:
                self._store.wait([key])
                break
            except dist.DistStoreError:  # nothing came for TAKE_SECONDS
                continue
        message = self._store.get(key).decode()
        self._store.delete_key(key)
        self._taken += 1
        return message
