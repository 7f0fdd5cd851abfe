# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Sums of exponentials as integers, in one pass over logits. Suffixes: N rows, V vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def exponentials(logits_NV: Tensor, top_N: Tensor, fraction: int) -> Tensor:
    """int64 (N,): the sum of exp(logit - top), each rounded to a multiple of 2^-fraction."""
    rows, width = logits_NV.shape
    out = torch.zeros(rows, dtype=torch.int64, device=logits_NV.device)
    if logits_NV.numel():
        _exponentials[(rows, triton.cdiv(width, 8 * BLOCK))](
            logits_NV, top_N, out, logits_NV.stride(0), width, 2.0**fraction, BLOCK
        )
    return out


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
