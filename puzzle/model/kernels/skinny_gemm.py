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

COLUMNS, STEP = 64, 128
"""Columns and depth of a tile; both must divide the weight's."""

NARROW = 8192
"""Columns up to which the sum is cut in two parts."""

_COLUMNS, _STEP = tl.constexpr(COLUMNS), tl.constexpr(STEP)


def fits(weight: Tensor, transposed: bool) -> bool:
    """Whether `product` can take the weight."""
    depth, width = weight.shape if transposed else weight.shape[::-1]
    return width % COLUMNS == 0 and depth % STEP == 0 and weight.is_contiguous()


def product(x_MK: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x @ weight.T, or x @ weight if it is stored `transposed` (K, N); (M, N)."""
    x_MK = x_MK.contiguous()
    rows, depth = x_MK.shape
    width = weight.shape[1] if transposed else weight.shape[0]
    parts = 2 if width <= NARROW else 1
    out = x_MK.new_empty((rows, width))
    partial, locks = out, out
    if parts > 1:
        partial = x_MK.new_empty((parts, rows, width), dtype=torch.float32)
        locks = _locks(x_MK.device)
    height = max(16, triton.next_power_of_2(rows))
    share = triton.cdiv(depth // STEP, parts) * STEP
    _product[(width // COLUMNS, parts)](
        *(x_MK, weight, out, partial, locks, rows, width, depth, share, transposed, height, parts),
        num_warps=4,
        num_stages=4,
    )
    return out


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
    HEIGHT: tl.constexpr,
    PARTS: tl.constexpr,
):
    columns: tl.constexpr = _COLUMNS
    tile = tl.program_id(0)
    begin = tl.program_id(1) * share
    m = tl.arange(0, HEIGHT)
    n = tile * columns + tl.arange(0, columns)
    total = tl.zeros([columns, HEIGHT], tl.float32)
    for at in range(begin, tl.minimum(begin + share, depth), _STEP):
        k = at + tl.arange(0, _STEP)
        x = tl.load(x_ptr + m[None, :] * depth + k[:, None], mask=(m < rows)[None, :], other=0.0)
        if TRANSPOSED:
            w = tl.load(w_ptr + k[:, None] * width + n[None, :]).T
        else:
            w = tl.load(w_ptr + n[:, None] * depth + k[None, :])
        total = tl.dot(w, x, total, input_precision="ieee")
    inside = (m < rows)[None, :]
    here = m[None, :] * width + n[:, None]
    if PARTS == 1:
        tl.store(out_ptr + here, total, mask=inside)
    else:
        tl.store(partial_ptr + tl.program_id(1) * rows * width + here, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            whole = tl.zeros([columns, HEIGHT], tl.float32)
            for p in tl.static_range(PARTS):
                whole += tl.load(partial_ptr + p * rows * width + here, mask=inside, other=0.0)
            tl.store(out_ptr + here, whole, mask=inside)
            tl.store(locks_ptr + tile, 0)
