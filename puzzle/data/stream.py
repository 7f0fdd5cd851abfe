"""Rows dealt out in batches, in an order that a seed and a step fix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from puzzle.errors import UserError
from puzzle.files.jsonio import Fields, shown

Item = TypeVar("Item")


def generator(seed: int, counter: int) -> np.random.Generator:
    """Random numbers that depend on both alone."""
    return np.random.Generator(np.random.Philox(key=[seed, counter]))


@dataclass(frozen=True)
class LeftOut:
    """Places of the rows of a file that are not used: `long` ones, which have more tokens than `key` of the
    configuration allows, and `empty` ones, without text where there must be some."""

    key: str = ""
    long: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Rows."""
        return len(self.long) + len(self.empty)

    def remarks(self, kept: int, what: str) -> list[str]:
        """How many there are beside those `kept`, and which is the first of each kind."""
        found = []
        for places, why in ((self.long, f"longer than {self.key}"), (self.empty, "empty in part or whole")):
            if places:
                count = f"{len(places)} of {kept + len(self)} {what}"
                found.append(f"{count} are {why} and are left out, the first is {places[0]}")
        return found

    def all_of_them(self, what: str, most: int) -> str:
        """A refusal of a file of which nothing is left."""
        if not self.empty:
            return f"all {len(self)} {what} exceed {self.key} {most}"
        return f"of {len(self)} {what} {len(self.long)} exceed {self.key} {most}, the others are empty"


NONE_LEFT_OUT = LeftOut()


class Stream(Generic[Item]):
    """Deals batches of rows. A batch depends on the rows, the seed and its number alone. `remedy` says how
    to get the rows of a checkpoint back.

    Every epoch has its own order; what is left of an epoch after its last full batch is skipped, so that no
    row is twice in a batch.
    """

    remedy = "restore the file"

    def __init__(
        self, rows: Sequence[Item], digest: str, batch: int, seed: int, shuffle: bool, what: str
    ) -> None:
        """`digest` changes with any of the rows, which are called `what`. Raises UserError if there are fewer
        than a batch needs."""
        if batch > len(rows):
            raise UserError(f"batch is {batch} but there are only {len(rows)} {what}; lower batch")
        self.rows, self.digest, self.what = rows, digest, what
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.step = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.step // self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return len(self.rows) // self.batch

    def next(self) -> list[Item]:
        """The next batch, length `batch`."""
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = generator(self.seed, self.epoch).permutation(order)
        start = self.step % self._per_epoch * self.batch
        self.step += 1
        return [self.rows[i] for i in order[start : start + self.batch]]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"step": self.step, "batch": self.batch, "seed": self.seed, "digest": self.digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if the rows or the batch are others."""
        fields = Fields(state, "the checkpoint's state of the data")
        for name in ("batch", "seed"):
            if state.get(name) != getattr(self, name):
                found = shown(state.get(name))
                raise UserError(f"{name} is {getattr(self, name)} but {found} in the checkpoint")
        if fields.text("digest") != self.digest:
            raise UserError(f"the {self.what} or their tokens are not those of the checkpoint; {self.remedy}")
        self.step = fields.integer("step")
