# ruff: noqa: ANN001, ANN201 (Triton reads the types of a kernel's arguments off its call)
"""What the kernels of invariant attention share, so that their numbers are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

SIDE = 64
"""Queries of a decode pass, and keys of a block."""

SHARED = 200 << 10
"""Bytes of shared memory that tiles may take of what a Hopper GPU has (227 KiB)."""


class Tile(NamedTuple):
    """Queries and keys that go through the matrix units at once; warps, stages of copies."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch. Products and sums stay apart: which of them a compiler fuses is not told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


def fitting(tiles: Sequence[Tile], x: Tensor, rows: Callable[[Tile], int]) -> Tile:
    """The first of `tiles` whose `rows` of x (T, heads, dim) fit into shared memory; else the last one."""
    size = width_of(x) * x.itemsize
    return next((tile for tile in tiles if rows(tile) * size <= SHARED), tiles[-1])


def width_of(x: Tensor) -> int:
    """The head_dim of x (T, heads, dim), rounded up to what a tile may have."""
    return max(16, triton.next_power_of_2(x.shape[2]))


@triton.jit
def block(q, keys, values, seen, tops, totals, sums, scale):
    """Running maxima, weights and weighted sums of 64 queries, those of a block of keys added."""
    s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    s = tl.where(seen, s, -1e30)
    highest = tl.maximum(tops, tl.max(s, 1))
    weights = tl.where(seen, tl.exp2(s - highest[:, None]), 0.0)
    fade = tl.exp2(tops - highest)
    totals = totals * fade + tl.sum(weights, 1)
    sums = tl.dot(weights.to(q.dtype), values, sums * fade[:, None], input_precision="ieee")
    return highest, totals, sums


@triton.jit
def joined(tops, totals, sums, more_tops, more_totals, more_sums):
    """Two runs' maxima, weights and weighted sums as one's."""
    highest = tl.maximum(tops, more_tops)
    a, b = tl.exp2(tops - highest), tl.exp2(more_tops - highest)
    return highest, totals * a + more_totals * b, sums * a[:, None] + more_sums * b[:, None]


@triton.jit
def seen_of(n, position, WINDOW: tl.constexpr):
    """Which keys at `n` the queries at `position` see."""
    seen = n <= position
    if WINDOW > 0:
        seen = seen & (n > position - WINDOW)
    return seen


@triton.jit
def first(position, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Where the first block (or run) of `SIZE` positions begins that a query at `position` sees."""
    if WINDOW > 0:
        return tl.maximum(position + 1 - WINDOW, 0) // SIZE * SIZE
    return 0
