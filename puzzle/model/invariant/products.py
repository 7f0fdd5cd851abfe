"""Matrix products each of whose numbers depends on its own row and column alone, and on how K is cut.

On CUDA a kernel of our own sees to that (`kernels.invariant_gemm`). On a CPU the BLAS does, within limits
that `steady` tries out once: from 16 rows and 16 columns on, and over at most 256 products, it adds them in
one order, wherever the number stands and on however many threads. So operands are padded with zeros, K is cut
into pieces of 256, and a CPU where that does not hold multiplies column by column.
Suffixes: M rows, N columns, K summed, Z matrices.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from puzzle.model.invariant.sums import pad_to, tree_sum
from puzzle.model.pointwise import has_kernels

SIDE, DEPTH = 16, 256
"""Least rows and columns, and most products to a sum, for which a BLAS is asked."""


def product(x_MK: Tensor, w_NK: Tensor, parts: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """x @ w.T in `dtype` (that of x): float32 sums over `parts` equal pieces of K, added as a tree."""
    if has_kernels(x_MK.device):
        from puzzle.model.kernels import invariant_gemm

        return invariant_gemm.product(x_MK, w_NK, parts, dtype=dtype)
    rows, width = len(x_MK), len(w_NK)
    x, w = (pad_to(each.float(), SIDE, -2) for each in (x_MK, w_NK))
    share = x.shape[1] // parts
    sums = [
        _chain(x[None, :, i : i + share], w[None, :, i : i + share], DEPTH)
        for i in range(0, x.shape[1], share)
    ]
    return tree_sum(torch.cat(sums), 0)[:rows, :width].to(dtype or x_MK.dtype)


def products(x_ZMK: Tensor, w_ZNK: Tensor, depth: int = DEPTH) -> Tensor:
    """float32 x @ w.T of every pair of matrices; K is cut into pieces of `depth`, added from the first on.

    Zeros behind the end of K change nothing if they complete a piece.
    """
    rows, width = x_ZMK.shape[1], w_ZNK.shape[1]
    x, w = (pad_to(each.float(), SIDE, -2) for each in (x_ZMK, w_ZNK))
    return _chain(x, w, depth)[:, :rows, :width]


def accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total (float32) += left @ right, or = if it is the `first`."""
    if has_kernels(total.device):
        from puzzle.model.kernels import invariant_gemm

        invariant_gemm.product(left, right.t(), out=total, add=not first)
    elif first:
        total.copy_(product(left, right.t(), dtype=torch.float32))
    else:
        total.add_(product(left, right.t(), dtype=torch.float32))


def _chain(x: Tensor, w: Tensor, depth: int) -> Tensor:
    total = None
    for start in range(0, x.shape[2], depth):
        one, other = x[..., start : start + depth].contiguous(), w[..., start : start + depth].contiguous()
        piece = torch.bmm(one, other.transpose(1, 2)) if steady() else by_columns(one, other)
        total = piece if total is None else total + piece
    return x.new_zeros((*x.shape[:2], w.shape[1])) if total is None else total


def by_columns(x_ZMK: Tensor, w_ZNK: Tensor) -> Tensor:
    """x @ w.T by elementwise operations, which round each number by itself. Slow."""
    total = x_ZMK.new_zeros((*x_ZMK.shape[:2], w_ZNK.shape[1]))
    for k in range(x_ZMK.shape[2]):
        total += x_ZMK[:, :, k, None] * w_ZNK[:, None, :, k]
    return total


@cache
def steady() -> bool:
    """Whether this CPU's BLAS gives a number the same bits in every matrix of the kind above."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((16, 16, 1), (16, 48, 1), (48, 64, 3), (64, 16, 2), (16, 1504, 1), (512, 272, 1))
    for depth in (16, 24, 64, 200, DEPTH):
        x_K, w_K = torch.randn((2, depth), generator=generator)
        seen: set[float] = set()
        for rows, width, count in sizes:
            x, w = (v.expand(count, n, depth).contiguous() for v, n in ((x_K, rows), (w_K, width)))
            seen.update(torch.bmm(x, w.transpose(1, 2)).unique().tolist())
        if len(seen) > 1:
            return False
    return True
