# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Products of a few rows with a weight matrix, as decode passes ask for: to read the weight is all the work.

The weight stands where the matrix units want their long side, the rows of `x` where a short one is allowed.
Where the output is too narrow to occupy the device, the sum is cut into parts; the last part of a tile to be done
adds them up, always in the same order. Suffixes: M rows, N columns, K summed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiling(NamedTuple):
    """Columns and depth of a tile, parts of the sum, warps, tiles under way, and if TMA copies."""

    columns: int
    depth: int
    parts: int
    warps: int
    stages: int
    tma: bool


TILINGS: dict[tuple[int, bool], Tiling] = {
    (32, True): Tiling(columns=64, depth=128, parts=2, warps=4, stages=4, tma=False),
    (16, True): Tiling(columns=64, depth=128, parts=2, warps=4, stages=4, tma=False),
    (32, False): Tiling(columns=64, depth=128, parts=1, warps=4, stages=4, tma=True),
    (16, False): Tiling(columns=64, depth=128, parts=1, warps=4, stages=4, tma=True),
    (64, True): Tiling(columns=64, depth=128, parts=2, warps=4, stages=4, tma=False),
    (64, False): Tiling(columns=64, depth=128, parts=1, warps=4, stages=4, tma=True),
}
"""By rows, rounded up to a power of two, and whether the output is narrow; measured on an H100."""

NARROW = 8192


def tiling(x: Tensor, weight: Tensor, transposed: bool) -> Tiling | None:
    """How to cut x @ weight; None where the BLAS is better or the matrix does not divide."""
    rows, depth = x.shape
    width = weight.shape[1] if transposed else weight.shape[0]
    found = TILINGS.get((max(16, triton.next_power_of_2(rows)), width <= NARROW))
    if found is None or width % found.columns or depth % found.depth:
        return None
    return found if x.is_contiguous() and weight.is_contiguous() else None


def product(x_MK: Tensor, weight: Tensor, transposed: bool, tiling: Tiling) -> Tensor:
    """x @ weight.T, or x @ weight if it is stored `transposed` (K, N); (M, N). The tiling divides N and K."""
    rows, depth = x_MK.shape
    width = weight.shape[1] if transposed else weight.shape[0]
    columns, step, parts, warps, stages, tma = tiling
    out = x_MK.new_empty((rows, width))
    partial, locks = out, out
    if parts > 1:
        partial = x_MK.new_empty((parts, rows, width), dtype=torch.float32)
        locks = _locks(x_MK.device)
    height = max(16, triton.next_power_of_2(rows))
    x_from, w_from = x_MK, weight
    if tma:
        x_from = TensorDescriptor.from_tensor(x_MK, [height, step])
        w_from = TensorDescriptor.from_tensor(weight, [step, columns] if transposed else [columns, step])
    share = triton.cdiv(depth // step, parts) * step
    _product[(width // columns, parts)](
        *(x_from, w_from, out, partial, locks, rows, width, depth, share),
        *(transposed, tma, height, columns, step, parts),
        num_warps=warps,
        num_stages=stages,
    )
    return out


@cache
def _locks(device: torch.device) -> Tensor:
    """int32: how many parts of a tile are done; always zeros between products."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


@triton.jit
def _product(
    x_from,
    w_from,
    out_ptr,
    partial_ptr,
    locks_ptr,
    rows,
    width,
    depth,
    share,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = tl.arange(0, HEIGHT)
    first = tile * COLUMNS
    n = first + tl.arange(0, COLUMNS)
    begin = part * share
    total = tl.zeros([COLUMNS, HEIGHT], tl.float32)
    for at in range(begin, tl.minimum(begin + share, depth), STEP):
        k = at + tl.arange(0, STEP)
        if TMA:
            x = x_from.load([0, at]).T
        else:
            x = tl.load(x_from + m[None, :] * depth + k[:, None], mask=(m < rows)[None, :], other=0.0)
        if TMA and TRANSPOSED:
            w = w_from.load([at, first]).T
        elif TMA:
            w = w_from.load([first, at])
        elif TRANSPOSED:
            w = tl.load(w_from + k[:, None] * width + n[None, :]).T
        else:
            w = tl.load(w_from + n[:, None] * depth + k[None, :])
        total = tl.dot(w, x, total, input_precision="ieee")
    inside = (m < rows)[None, :]
    here = m[None, :] * width + n[:, None]
    if PARTS == 1:
        tl.store(out_ptr + here, total, mask=inside)
    else:
        tl.store(partial_ptr + part * rows * width + here, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before the count says so
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            whole = tl.zeros([COLUMNS, HEIGHT], tl.float32)
            for p in tl.static_range(PARTS):
                whole += tl.load(partial_ptr + p * rows * width + here, mask=inside, other=0.0)
            tl.store(out_ptr + here, whole, mask=inside)
            tl.store(locks_ptr + tile, 0)
