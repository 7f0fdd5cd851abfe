"""What a logical tensor is and by which rule tensor parallelism cuts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = int | Literal["embed", "head", "tied"]
"""A layer index, or the first stage, the last stage, or both."""


@dataclass(frozen=True)
class Split:
    """Dimension `dim` is cut into `units` equal blocks (query heads, key/value heads, ffn blocks).

    Rank t of tp holds `units/tp` consecutive blocks or, where tp is a multiple of units, block `t*units//tp`.
    """

    dim: int
    units: int

    def interval(self, size: int, tp: int, t: int) -> tuple[int, int]:
        """Half-open interval of dimension `dim` (of extent `size`) that rank t holds."""
        block = size // self.units
        if self.units % tp == 0:
            share = self.units // tp
            return t * share * block, (t + 1) * share * block
        unit = t * self.units // tp
        return unit * block, (unit + 1) * block

    def holders(self, tp: int, t: int) -> range:
        """The tensor ranks that hold the same interval as rank t."""
        copies = max(1, tp // self.units)
        first = t // copies * copies
        return range(first, first + copies)


EIGHTHS = 8


@dataclass(frozen=True)
class VocabSplit:
    """Rows (dimension 0) are cut into tp equal chunks; what lies beyond V is padding, in no box.

    Chunks of 2, 4 and 8 ranks are whole eighths of `8 ceil(V/8)` rows, so that borders of one such layout are
    borders of the next; others have `ceil(V/tp)` rows.
    """

    dim: int = 0

    @staticmethod
    def chunk(size: int, tp: int) -> int:
        """Rows of a chunk, padding included."""
        if tp > 1 and EIGHTHS % tp == 0:
            return -(-size // EIGHTHS) * (EIGHTHS // tp)
        return -(-size // tp)

    def interval(self, size: int, tp: int, t: int) -> tuple[int, int]:
        """Half-open interval of rows that rank t holds; empty for ranks past the last row."""
        chunk = self.chunk(size, tp)
        return min(t * chunk, size), min((t + 1) * chunk, size)

    def holders(self, tp: int, t: int) -> range:
        """The tensor ranks that hold the same interval as rank t: itself alone."""
        return range(t, t + 1)


@dataclass(frozen=True)
class TensorSpec:
    """One logical tensor: Hugging Face name, global shape, place in the pipeline, rule of the cut.

    `trained`: where its model has an optimizer, this tensor is learned; others are frozen. `adapter`: which
    of an adapter's two matrices it is.
    """

    name: str
    shape: tuple[int, ...]
    place: Place
    split: Split | VocabSplit | None
    trained: bool = True
    adapter: Literal["A", "B"] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count
