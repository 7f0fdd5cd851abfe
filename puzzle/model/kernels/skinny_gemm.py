# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Products of a few rows with a weight matrix, as decode passes ask for: to read the weight is all the work.

The weight stands where the matrix units want their long side, the rows of `x` where a short one is allowed.
Where the output is too narrow to occupy the device, the sum is cut into parts; the last part of a tile to be
done adds them up, always in the same order. Suffixes: M rows, N columns, K summed.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.kernels import multiprocessors, room

COLUMNS, STEP = 64, 128
"""Columns and most depth of a tile; both must divide the weight's."""

NARROW = 8192
"""Columns up to which the sum is cut in two parts."""

UNDER_WAY = 196 << 10
"""Bytes of tiles under way on a multiprocessor. With so many as leave room for all programs of a product at
once, products of a 7B layer took up to 16 % less at 16, 32 and 64 rows than with four tiles (one H200)."""

_COLUMNS = tl.constexpr(COLUMNS)


def fits(weight: Tensor, transposed: bool) -> bool:
    """Whether `product` can take the weight, whose elements it counts in 31 bits."""
    depth, width = weight.shape if transposed else weight.shape[::-1]
    whole = width % COLUMNS == 0 and depth % STEP == 0 and weight.is_contiguous()
    return whole and weight.numel() < 1 << 31


def product(x_MK: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x @ weight.T, or x @ weight if it is stored `transposed` (K, N); (M, N)."""
    width = weight.shape[1] if transposed else weight.shape[0]
    return _launch(x_MK, weight, transposed, x_MK.new_empty((len(x_MK), width)), 0)


def fits_gates(weight: Tensor, blocks: int) -> bool:
    """Whether `gates` can take the weight."""
    return fits(weight, False) and len(weight) % (COLUMNS * blocks) == 0


def gates(x_MK: Tensor, weight: Tensor, blocks: int) -> Tensor:
    """silu(gate) * up, (M, N / 2), of x @ weight.T, whose N columns are `blocks` blocks of gate, then up.

    The numbers are those of `product` and `inference.gated`: a tile has columns of both, rounds them, and
    writes what comes of them.
    """
    size = len(weight) // (2 * blocks)
    return _launch(x_MK, weight, False, x_MK.new_empty((len(x_MK), len(weight) // 2)), size)


def _launch(x_MK: Tensor, weight: Tensor, transposed: bool, out: Tensor, size: int) -> Tensor:
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
        *(x_MK, weight, out, partial, locks, rows, width, depth, share),
        *(transposed, size, height, step, parts),
        num_warps=4,
        num_stages=_stages(tile, together, room(x_MK.device)),
    )
    return out


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
    rows,
    width,
    depth,
    share,
    TRANSPOSED: tl.constexpr,
    SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of the product or, for gates in blocks of SIZE, of what comes of half as many gates and ups."""
    columns: tl.constexpr = _COLUMNS
    half: tl.constexpr = columns // 2
    tile = tl.program_id(0)
    begin = tl.program_id(1) * share
    m = tl.arange(0, HEIGHT)
    i = tl.arange(0, columns)
    n = tile * columns + i
    if SIZE > 0:
        gate = tile * half + i % half
        n = gate + gate // SIZE * SIZE + i // half * SIZE
    total = tl.zeros([columns, HEIGHT], tl.float32)
    for at in range(begin, tl.minimum(begin + share, depth), STEP):
        k = at + tl.arange(0, STEP)
        x = tl.load(x_ptr + m[None, :] * depth + k[:, None], mask=(m < rows)[None, :], other=0.0)
        if TRANSPOSED:
            w = tl.load(w_ptr + k[:, None] * width + n[None, :], eviction_policy="evict_first").T
        else:
            w = tl.load(w_ptr + n[:, None] * depth + k[None, :], eviction_policy="evict_first")
        total = tl.dot(w, x, total, input_precision="ieee")
    inside = (m < rows)[None, :]
    if PARTS == 1:
        _put(out_ptr, total, tile, m, inside, width, SIZE, HEIGHT)
    else:
        here = m[None, :] * width + (tile * columns + i)[:, None]
        tl.store(partial_ptr + tl.program_id(1) * rows * width + here, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            whole = tl.zeros([columns, HEIGHT], tl.float32)
            for p in tl.static_range(PARTS):
                whole += tl.load(partial_ptr + p * rows * width + here, mask=inside, other=0.0)
            _put(out_ptr, whole, tile, m, inside, width, SIZE, HEIGHT)
            tl.store(locks_ptr + tile, 0)


@triton.jit
def _put(out_ptr, total, tile, m, inside, width, SIZE: tl.constexpr, HEIGHT: tl.constexpr):
    """Write a tile's columns, or what comes of its gates, above, and its ups, below."""
    columns: tl.constexpr = _COLUMNS
    half: tl.constexpr = columns // 2
    if SIZE > 0:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, half, HEIGHT]), [1, 2, 0]))
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        f = tile * half + tl.arange(0, half)
        to = out_ptr + m[None, :] * (width // 2) + f[:, None]
        tl.store(to, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)
    else:
        to = out_ptr + m[None, :] * width + (tile * columns + tl.arange(0, columns))[:, None]
        tl.store(to, total, mask=inside)
