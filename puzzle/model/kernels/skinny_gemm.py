# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Products of a few rows with a weight matrix, as decode passes ask for: to read the weight is all the work.

The weight stands where the matrix units want their long side, the rows of `x` where a short one is allowed.
Where the output is too narrow to occupy the device, the sum is cut into parts; the last part of a tile to be
done adds them up, always in the same order. Suffixes: M rows, N columns, K summed.

A norm between two products is done by both, for a kernel that does nothing else costs more than its bytes:

    first:   total = before + x @ weight          rounded, a tile of columns at a time
             weighted = total * norm              what the second multiplies
             squares = sum(total^2)               of the tile's columns, for each row
    second:  (weighted @ weight) / sqrt(sum(squares) / D + eps)
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.kernels import multiprocessors, room
from puzzle.model.linear import Stream

COLUMNS, STEP = 64, 128
"""Columns and most depth of a tile; both must divide the weight's."""

NARROW = 8192
"""Columns up to which the sum is cut in two parts."""

UNDER_WAY = 196 << 10
"""Bytes of tiles under way on a multiprocessor. With so many as leave room for all programs of a product at
once, products of a 7B layer took up to 16 % less at 16, 32 and 64 rows than with four tiles (one H200)."""

_COLUMNS = tl.constexpr(COLUMNS)


def fits(weight: Tensor, transposed: bool) -> bool:
    """Whether a product can take the weight, whose elements it counts in 31 bits."""
    depth, width = weight.shape if transposed else weight.shape[::-1]
    whole = width % COLUMNS == 0 and depth % STEP == 0 and weight.is_contiguous()
    return whole and weight.numel() < 1 << 31


def product(x_MK: Tensor | Stream, weight: Tensor, transposed: bool) -> Tensor:
    """x @ weight.T, or x @ weight if it is stored `transposed` (K, N); (M, N)."""
    width = weight.shape[1] if transposed else weight.shape[0]
    out = weight.new_empty((_rows(x_MK), width))
    _launch(x_MK, weight, transposed, out, 0)
    return out


def add(x_MK: Tensor, weight_KN: Tensor, before_MN: Tensor, norm_N: Tensor, eps: float) -> Stream:
    """before + x @ weight, on its way into products that norm it."""
    before, norm = before_MN.contiguous(), norm_N.contiguous()
    total, weighted = torch.empty_like(before), torch.empty_like(before)
    squares = before.new_empty((before.shape[1] // COLUMNS, len(before)), dtype=torch.float32)
    _launch(x_MK, weight_KN, True, total, 0, (before, norm, weighted, squares))
    return Stream(total, weighted, squares, eps)


def gates(x_MK: Tensor | Stream, weight: Tensor, blocks: int) -> Tensor:
    """silu(gate) * up, (M, N / 2), of x @ weight.T, whose N columns are `blocks` blocks of gate, then up.

    The numbers are those of `product` and `inference.gated`: a tile has columns of both, rounds them, and
    writes what comes of them.
    """
    out = weight.new_empty((_rows(x_MK), len(weight) // 2))
    _launch(x_MK, weight, False, out, len(weight) // (2 * blocks))
    return out


def _rows(x: Tensor | Stream) -> int:
    return len(x.total if isinstance(x, Stream) else x)


def _launch(
    x_MK: Tensor | Stream,
    weight: Tensor,
    transposed: bool,
    out: Tensor,
    size: int,
    added: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """`size`: of a block of gates, or 0. `added`: what else `add` reads and writes."""
    squares, eps, tiles = weight, 0.0, 0
    if isinstance(x_MK, Stream):
        squares, eps, tiles = x_MK.squares, x_MK.eps, triton.next_power_of_2(len(x_MK.squares))
        x_MK = x_MK.weighted
    x_MK = x_MK.contiguous()
    rows, depth = x_MK.shape
    width = weight.shape[1] if transposed else weight.shape[0]
    parts = 2 if width <= NARROW else 1
    partial, locks = out, out
    if parts > 1:
        partial = x_MK.new_empty((parts, rows, width), dtype=torch.float32)
        locks = _locks(x_MK.device)
    height = max(16, triton.next_power_of_2(rows))
    step = STEP if parts > 1 or height < COLUMNS else STEP // 2
    together = triton.cdiv(width // COLUMNS * parts, multiprocessors(x_MK.device))
    tile = (COLUMNS + height) * step * weight.itemsize
    share = triton.cdiv(depth // step, parts) * step
    _product[(width // COLUMNS, parts)](
        *(x_MK, weight, out, partial, locks, squares, *(added or (out, out, out, out))),
        *(eps, rows, width, depth, share),
        *(transposed, size, tiles, added is not None, height, step, parts),
        num_warps=4,
        num_stages=_stages(tile, together, room(x_MK.device)),
    )


def _stages(tile: int, together: int, room: int) -> int:
    """Tiles of so many bytes that a program has under way: so many programs are `together` on a
    multiprocessor, and each may have `room` bytes of it."""
    return max(1, min(room // tile, max(3, min(5, UNDER_WAY // (together * tile)))))


@cache
def _locks(device: torch.device) -> Tensor:
    """int32: how many parts of a tile are done; zeros between products, which run one after another."""
    return torch.zeros(NARROW // COLUMNS, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    locks_ptr,
    normed_ptr,
    before_ptr,
    norm_ptr,
    weighted_ptr,
    squares_ptr,
    eps,
    rows,
    width,
    depth,
    share,
    TRANSPOSED: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    ADD: tl.constexpr,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of the product or, for gates in blocks of SIZE, of what comes of half as many gates and ups.

    The rows of x want a norm if there are TILES (at least so many) of their squares at `normed_ptr`.
    """
    columns: tl.constexpr = _COLUMNS
    tile = tl.program_id(0)
    begin = tl.program_id(1) * share
    m = tl.arange(0, HEIGHT)
    n = _columns_of(tile, SIZE)
    inside = (m < rows)[None, :]
    if TILES > 0:  # asked for here, added up after the product, which hides how long they take to come
        t = tl.arange(0, TILES)
        squares_here = normed_ptr + t[:, None] * rows + m[None, :]
        squares = tl.load(squares_here, mask=(t < depth // columns)[:, None] & inside, other=0.0)
    end = tl.minimum(begin + share, depth)
    total = _multiplied(x_ptr, w_ptr, m, n, inside, begin, end, width, depth, TRANSPOSED, HEIGHT, STEP)
    if TILES > 0:
        total *= (1.0 / tl.sqrt(tl.sum(squares, 0) / depth + eps))[None, :]
    here = m[None, :] * width + (tile * columns + tl.arange(0, columns))[:, None]
    before, norm = total, total
    if ADD:  # asked for here, they come while parts are put together
        before = tl.load(before_ptr + here, mask=inside, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + n).to(tl.float32)[:, None]
    more = (before, norm, weighted_ptr + here, squares_ptr + tile * rows)
    if PARTS == 1:
        _put(out_ptr, more, total, tile, m, rows, width, SIZE, ADD, HEIGHT)
    else:
        tl.store(partial_ptr + tl.program_id(1) * rows * width + here, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            whole = tl.zeros([columns, HEIGHT], tl.float32)
            for p in tl.static_range(PARTS):
                whole += tl.load(partial_ptr + p * rows * width + here, mask=inside, other=0.0)
            _put(out_ptr, more, whole, tile, m, rows, width, SIZE, ADD, HEIGHT)
            tl.store(locks_ptr + tile, 0)


@triton.jit
def _columns_of(tile, SIZE: tl.constexpr):
    """Of a tile: as many gates as ups that belong to them, for gates in blocks of SIZE."""
    half: tl.constexpr = _COLUMNS // 2
    i = tl.arange(0, _COLUMNS)
    n = tile * _COLUMNS + i
    if SIZE > 0:
        gate = tile * half + i % half
        n = gate + gate // SIZE * SIZE + i // half * SIZE
    return n


@triton.jit
def _multiplied(
    x_ptr,
    w_ptr,
    m,
    n,
    inside,
    begin,
    end,
    width,
    depth,
    TRANSPOSED: tl.constexpr,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sum from begin to end, columns by rows, in float32."""
    total = tl.zeros([_COLUMNS, HEIGHT], tl.float32)
    for at in range(begin, end, STEP):
        k = at + tl.arange(0, STEP)
        x = tl.load(x_ptr + m[None, :] * depth + k[:, None], mask=inside, other=0.0)
        if TRANSPOSED:
            w = tl.load(w_ptr + k[:, None] * width + n[None, :], eviction_policy="evict_first").T
        else:
            w = tl.load(w_ptr + n[:, None] * depth + k[None, :], eviction_policy="evict_first")
        total = tl.dot(w, x, total, input_precision="ieee")
    return total


@triton.jit
def _put(
    out_ptr, more, total, tile, m, rows, width, SIZE: tl.constexpr, ADD: tl.constexpr, HEIGHT: tl.constexpr
):
    """Write a tile's columns, or what comes of its gates, above, and ups, below, or all that `add` gives."""
    columns: tl.constexpr = _COLUMNS
    half: tl.constexpr = columns // 2
    inside = (m < rows)[None, :]
    if SIZE > 0:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, half, HEIGHT]), [1, 2, 0]))
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        f = tile * half + tl.arange(0, half)
        to = out_ptr + m[None, :] * (width // 2) + f[:, None]
        tl.store(to, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)
    else:
        to = out_ptr + m[None, :] * width + (tile * columns + tl.arange(0, columns))[:, None]
        if ADD:
            before, norm, weighted_to, squares_to = more
            rounded = (total.to(out_ptr.dtype.element_ty).to(tl.float32) + before).to(
                out_ptr.dtype.element_ty
            )
            tl.store(to, rounded, mask=inside)
            added = rounded.to(tl.float32)
            tl.store(weighted_to, added * norm, mask=inside)
            tl.store(squares_to + m, tl.sum(added * added, 0), mask=m < rows)
        else:
            tl.store(to, total, mask=inside)
