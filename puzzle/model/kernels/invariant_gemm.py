# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Matrix products on the matrix units, each number of which is the same whatever else is computed beside it.

A number is a sum over K. It is cut into `parts`; in a part the matrix units add 16 products at a time, from
the first to the last, to one float32; parts are added in pairs, pairs in pairs. Neither the size of a tile
nor the other rows change that, as long as the operands stand on the same sides and the same instruction is
used: WGMMA, whose long side of 64 stands for the columns where rows are few. (Which side it is changes
nothing: `puzzle bench exact` compares.)

```
few rows:   parts side by side; the last one of a tile that is done adds all     p0 | p1 | p2 | p3 -> tree
many rows:  one part after the other, sums kept in float32 between them          A=p0  A+=p1  B=p2  A+(B+p3)
            one or two parts by the copy engine of Hopper (TMA)                  p0 (+ p1)
```

Suffixes: M rows, N columns, K summed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from puzzle.model.kernels import multiprocessors

MOST_PARTS = 8

ENGINE_DEPTH = 64
"""Products of a tile that the copy engine brings."""

FEW = 128
"""Rows up to which parts are computed side by side."""


class Tile(NamedTuple):
    """Rows, columns and depth of a tile; warps, stages. They change speed alone.

    Where the copy engine brings tiles: `programs` that a multiprocessor runs at a time; whether the loops
    over tiles and over K are one (`flat`), so that the next tile is copied while one is stored; whether that
    is done in two `halves`, with half of the registers and shared memory; and how many tiles one above the
    other are computed before those beside them (`band`).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    flat: bool = False
    halves: bool = False
    band: int = 8


def product(
    x_MK: Tensor,
    w_NK: Tensor,
    parts: int = 1,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    add: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x @ w.T, (M, N) in `dtype` (that of x), or added to `out`; operands may have any strides.

    `tile` is another than what was quickest. ValueError unless parts are 1, 2, 4 or 8, K divides into them,
    and only whole sums are added.
    """
    rows, depth = x_MK.shape
    width = w_NK.shape[0]
    if parts not in (1, 2, 4, MOST_PARTS) or depth % parts or (add and parts > 1):
        raise ValueError(f"{depth} products do not go in {parts} parts")
    if out is None:
        out = torch.empty((rows, width), dtype=dtype or x_MK.dtype, device=x_MK.device)
    if not out.numel():
        return out
    run = _Run(x_MK, w_NK, out, depth // parts, tile)
    if rows > FEW and parts <= 2 and run.copied_by_engine():
        run.by_engine(parts, add, tile or engine_tile(parts, out))
    elif parts == 1:
        run.part(0, out, [out] if add else [])
    elif rows <= FEW:
        run.side_by_side(parts)
    else:
        run.in_turn(parts)
    return out


class _Run:
    """The launches of one product."""

    def __init__(self, x: Tensor, w: Tensor, out: Tensor, share: int, tile: Tile | None) -> None:
        self.x, self.w, self.out, self.share = x, w, out, share
        self.rows, self.width = out.shape
        self.tile = tile or tile_for(self.rows, self.width, x.dtype)

    def part(self, part: int, to: Tensor, addends: list[Tensor], side_by_side: int = 1) -> None:
        """Part `part` and what is added to it, the first addend first."""
        tile, given = self.tile, [*addends, to, to, to]
        tiles = triton.cdiv(self.rows, tile.rows) * triton.cdiv(self.width, tile.columns)
        whole = self.rows % tile.rows == 0 and self.width % tile.columns == 0
        partial, locks = to, to
        if side_by_side > 1:
            partial = torch.empty((side_by_side, *to.shape), dtype=torch.float32, device=to.device)
            locks = _locks(to.device, tiles)
        _product[(tiles, side_by_side)](
            *(self.x, self.w, to, *given[:3], partial, locks, self.rows, self.width, part * self.share),
            *(self.share, *self.x.stride(), *self.w.stride(), *to.stride()),
            *(len(addends), side_by_side, self.share % tile.depth == 0, whole),
            *(tile.rows, tile.columns, tile.depth),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def copied_by_engine(self) -> bool:
        """Whether the copy engine takes these operands."""
        if self.x.itemsize != 2 or self.share % ENGINE_DEPTH or self.out.stride(1) != 1:
            return False
        if not _has_engine(self.out.device):
            return False
        return all(_along(t) is not None and t.data_ptr() % 16 == 0 for t in (self.x, self.w))

    def by_engine(self, parts: int, add: bool, tile: Tile) -> None:
        """One or two parts, both in one launch, whose programs take one tile after the other."""
        tiles = triton.cdiv(self.rows, tile.rows) * triton.cdiv(self.width, tile.columns)
        programs = min(tiles, tile.programs * multiprocessors(self.out.device))
        x_deep, w_deep = _along(self.x) == 1, _along(self.w) == 1
        _large[(programs,)](
            _described(self.x, tile.rows, tile.depth),
            _described(self.w, tile.columns, tile.depth),
            *(self.out, self.rows, self.width, self.share, self.out.stride(0), programs),
            *(x_deep, w_deep, parts, add, tile.flat, tile.halves, tile.band, *tile[:3]),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def side_by_side(self, parts: int) -> None:
        """All parts in one launch."""
        self.part(0, self.out, [], parts)

    def in_turn(self, parts: int) -> None:
        """Part after part; `waiting` are sums of 4, 2 and 1 parts, as in a binary counter."""
        waiting: list[Tensor] = []
        for part in range(parts):
            merged = (part + 1 & -(part + 1)).bit_length() - 1
            addends = [waiting.pop() for _ in range(merged)]
            to = self.out
            if part < parts - 1:
                to = addends[-1] if addends else self.out.new_empty(self.out.shape, dtype=torch.float32)
            self.part(part, to, addends)
            waiting.append(to)


def tile_for(rows: int, width: int, dtype: torch.dtype) -> Tile:
    """What was quickest on an H200."""
    if dtype == torch.float32:
        return Tile(16 if rows <= 16 else 32, 64, 32, 4, 2)
    if rows <= 64:
        return Tile(max(16, triton.next_power_of_2(rows)), 64, 128, 4, 4)
    if rows <= 128:
        return Tile(128, 64, 64, 4, 4) if width > 8192 else Tile(64, 64, 128, 4, 4)
    if rows <= 512:
        return Tile(128, 128, 64, 8, 4)
    return Tile(256, 128, 64, 8, 3)


def engine_tile(parts: int, out: Tensor) -> Tile:
    """What was quickest on an H200 for many rows that the copy engine brings."""
    if parts > 1:
        return Tile(128, 128, ENGINE_DEPTH, 8, 4)
    # In float32 a whole tile that is stored leaves no room for copies of the next one.
    wide = out.itemsize == 4
    return Tile(128, 256, ENGINE_DEPTH, 8, 3 if wide else 4, flat=True, halves=wide)


def _along(x: Tensor) -> int | None:
    """The dimension whose neighbours lie side by side, if the copy engine can take the matrix so."""
    for dim in (1, 0):
        if x.stride(dim) == 1 and x.stride(1 - dim) * x.itemsize % 16 == 0:
            return dim
    return None


def _described(x: Tensor, long: int, deep: int) -> TensorDescriptor:
    """Blocks of `long` rows and `deep` products of an operand, as they lie."""
    if _along(x) == 1:
        return TensorDescriptor.from_tensor(x, [long, deep])
    return TensorDescriptor.from_tensor(x.t(), [deep, long])


@cache
def _has_engine(device: torch.device) -> bool:
    """Hopper's and later GPUs have one; the interpreter plays it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _locks(device: torch.device, tiles: int) -> Tensor:
    """int32: how many parts of a tile are done; zeros between products, which run one after another."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@triton.jit
def _in_bands(tile, long, short, BAND: tl.constexpr):
    """(place in `long`, in `short`) of a tile: some of the first at a time, so that what they share stays in
    the cache."""
    band = tile // (BAND * short)
    height = tl.minimum(long - band * BAND, BAND)
    return band * BAND + tile % (BAND * short) % height, tile % (BAND * short) // height


@triton.jit(do_not_specialize=["rows"])
def _product(
    x_ptr,
    w_ptr,
    out_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    partial_ptr,
    locks_ptr,
    rows,
    width,
    begin,
    share,
    x_row,
    x_deep,
    w_row,
    w_deep,
    out_row,
    out_column,
    ADDENDS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile, its columns along the long side."""
    tile = tl.program_id(0)
    n_tile, m_tile = _in_bands(tile, tl.cdiv(width, BN), tl.cdiv(rows, BM), 8)
    m, n = m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN)
    # `%` hides from the compiler what lies side by side.
    x = x_ptr + (m if WHOLE else m % rows).to(tl.int64)[None, :] * x_row
    w = w_ptr + (n if WHOLE else n % width).to(tl.int64)[:, None] * w_row
    total = _chain(x, w, x_deep, w_deep, begin + tl.program_id(1) * share, share, EVEN, BM, BN, BK)
    inside = (m < rows)[None, :] & (n < width)[:, None]
    at_m, at_n = m.to(tl.int64)[None, :], n.to(tl.int64)[:, None]
    here = at_m * out_row + at_n * out_column
    if PARTS == 1:
        # What waits is contiguous, and so is `out` where anything is added.
        if ADDENDS > 0:
            total = tl.load(first_ptr + at_m * width + at_n, mask=inside, other=0.0) + total
        if ADDENDS > 1:
            total = tl.load(second_ptr + at_m * width + at_n, mask=inside, other=0.0) + total
        if ADDENDS > 2:
            total = tl.load(third_ptr + at_m * width + at_n, mask=inside, other=0.0) + total
        tl.store(out_ptr + here, total, mask=inside)
    else:
        size, place = rows.to(tl.int64) * width, partial_ptr + at_m * width + at_n
        tl.store(place + tl.program_id(1) * size, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            total = _pair(place, size, inside, 0)
            if PARTS > 2:
                total += _pair(place, size, inside, 2)
            if PARTS > 4:
                total += _pair(place, size, inside, 4) + _pair(place, size, inside, 6)
            tl.store(out_ptr + here, total, mask=inside)
            tl.store(locks_ptr + tile, 0)


@triton.jit
def _chain(
    x,
    w,
    x_deep,
    w_deep,
    first,
    share,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The sum over products [first, first + share)."""
    inner = tl.arange(0, BK)
    total = tl.zeros([BN, BM], tl.float32)
    for at in range(0, share, BK):
        k = (first + at + inner).to(tl.int64)
        if EVEN:
            a = tl.load(w + k[None, :] * w_deep)
            b = tl.load(x + k[:, None] * x_deep)
        else:
            left = at + inner < share
            a = tl.load(w + k[None, :] * w_deep, mask=left[None, :], other=0.0)
            b = tl.load(x + k[:, None] * x_deep, mask=left[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _pair(place, size, inside, part):
    left = tl.load(place + part * size, mask=inside, other=0.0)
    return left + tl.load(place + (part + 1) * size, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _large(
    x,
    w,
    out_ptr,
    rows,
    width,
    share,
    out_row,
    programs,
    X_DEEP: tl.constexpr,
    W_DEEP: tl.constexpr,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    FLAT: tl.constexpr,
    HALVES: tl.constexpr,
    BAND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Tile after tile."""
    m_tiles, n_tiles = tl.cdiv(rows, BM), tl.cdiv(width, BN)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, programs, flatten=FLAT):
        m_tile, n_tile = _in_bands(tile, m_tiles, n_tiles, BAND)
        m_first, n_first = m_tile * BM, n_tile * BN
        total = _copied(x, w, m_first, n_first, 0, share, X_DEEP, W_DEEP, BM, BN, BK)
        if PARTS == 2:
            total += _copied(x, w, m_first, n_first, share, share, X_DEEP, W_DEEP, BM, BN, BK)
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
            _stored(left, out_ptr, out_row, m_first, n_first, rows, width, ADD, BM, BN // 2)
            _stored(right, out_ptr, out_row, m_first, n_first + BN // 2, rows, width, ADD, BM, BN // 2)
        else:
            _stored(total, out_ptr, out_row, m_first, n_first, rows, width, ADD, BM, BN)


@triton.jit
def _stored(
    sums, out, out_row, m_first, n_first, rows, width, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Put sums, or add them, where they belong."""
    m, n = m_first + tl.arange(0, BM), n_first + tl.arange(0, BN)
    here = out + m.to(tl.int64)[:, None] * out_row + n[None, :]
    inside = (m < rows)[:, None] & (n < width)[None, :]
    if ADD:
        sums = tl.load(here, mask=inside, other=0.0) + sums
    tl.store(here, sums, mask=inside)


@triton.jit
def _copied(
    x,
    w,
    m_first,
    n_first,
    begin,
    share,
    X_DEEP: tl.constexpr,
    W_DEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One part of a tile; what lies outside of a matrix is zero."""
    total = tl.zeros([BM, BN], tl.float32)
    for at in range(begin, begin + share, BK):
        if X_DEEP:
            a = x.load([m_first, at])
        else:
            a = x.load([at, m_first]).T
        if W_DEEP:
            b = w.load([n_first, at])
        else:
            b = w.load([at, n_first]).T
        total = tl.dot(a, b.T, total)
    return total
