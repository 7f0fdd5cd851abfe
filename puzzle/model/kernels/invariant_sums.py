# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Sums of exponentials and of squares as integers, in one pass over them. Suffixes: N rows, V vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
SQUARES = 8
"""Blocks of a program that adds squares: what it has found costs it two atomics."""


def exponentials(logits_NV: Tensor, top_N: Tensor, fraction: int) -> Tensor:
    """int64 (N,): the sum of exp(logit - top), each rounded to a multiple of 2^-fraction."""
    rows, width = logits_NV.shape
    out = torch.zeros(rows, dtype=torch.int64, device=logits_NV.device)
    if logits_NV.numel():
        _exponentials[(rows, triton.cdiv(width, 8 * BLOCK))](
            logits_NV, top_N, out, logits_NV.stride(0), width, 2.0**fraction, BLOCK
        )
    return out


def squares(x: Tensor, scale: Tensor, limbs: Tensor, bits: int) -> None:
    """Add the squares of `x` (float32, a vector) times `scale` (float64, 0-d), which are below 1, to `limbs`.

    Each is rounded to a multiple of 2^-(2 bits); `limbs` (int64, 2) are multiples of 2^-bits and of that.
    """
    each = SQUARES * BLOCK
    _squares[(triton.cdiv(len(x), each),)](x, scale, limbs, len(x), bits, SQUARES, BLOCK)


@triton.jit(do_not_specialize=["width"])
def _exponentials(logits_ptr, top_ptr, out_ptr, stride, width, scale, BLOCK: tl.constexpr):
    """Eight blocks of a row. Programs add up with atomics: integers have no order."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(top_ptr + row)
    total = tl.zeros([BLOCK], tl.int64)
    for block in range(8):
        at = (tl.program_id(1) * 8 + block) * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + row * stride + at, mask=at < width, other=float("-inf"))
        total += (tl.exp(logit - top).to(tl.float64) * scale + 0.5).to(tl.int64)
    tl.atomic_add(out_ptr + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _squares(
    x_ptr, scale_ptr, limbs_ptr, count, BITS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some blocks of a vector. Programs add up with atomics: integers have no order."""
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    scale = tl.load(scale_ptr)
    high, low = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float64) * scale
        # Products of 24 bits, and of those with powers of two, are exact: a fused step rounds alike.
        units = (x * x * 2.0 ** (2 * BITS) + 0.5).to(tl.int64)
        high += units >> BITS
        low += units & ((1 << BITS) - 1)
    tl.atomic_add(limbs_ptr, tl.sum(high, 0))
    tl.atomic_add(limbs_ptr + 1, tl.sum(low, 0))
