# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""A draw from every row of logits as one Triton kernel, with the noise of `noise.gumbel`.

The vocabulary is walked in blocks; each offers its best entry, as ranks of a tensor group do
(`engine.sampling`). Suffixes: B rows, V vocabulary, C blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.noise import GOLDEN, MIX_32, MIX_64, UNIT

BLOCK = 4096
_GOLDEN = tl.constexpr(GOLDEN)
_MIX_64_A, _MIX_64_B = tl.constexpr(MIX_64[0]), tl.constexpr(MIX_64[1])
_MIX_32_A, _MIX_32_B = tl.constexpr(MIX_32[0]), tl.constexpr(MIX_32[1])
_UNIT = tl.constexpr(UNIT)


def offers(
    logits_BV: Tensor,
    row_seed_B: Tensor | None,
    count_B: Tensor,
    offset: int,
    temperature: float,
    stops: tuple[int, ...],
    young: int,
) -> Tensor:
    """float32 (C, 4, B): of every block its largest logits / T + noise, the token there, that token's
    logits / T, and the logsumexp of logits / T.

    `logits_BV` begin at vocabulary entry `offset`; the noise is that of the row seeds, None adds none. Rows
    with `count_B` below `young` may draw none of `stops`.
    """
    rows, width = logits_BV.shape
    blocks = max(1, triton.cdiv(width, BLOCK))
    out = logits_BV.new_empty((blocks, 4, rows))
    if rows:
        _offer[(blocks, rows)](
            *(logits_BV, count_B if row_seed_B is None else row_seed_B, count_B, out, rows, width),
            *(logits_BV.stride(0), offset, 1.0 / temperature, young),
            *(row_seed_B is None, stops if young else (), BLOCK),
            num_warps=8,
        )
    return out


def settle(offers_C4B: Tensor) -> Tensor:
    """int32 (2, B): the token of each row's best offer and the bits of its float32 log-probability."""
    count, _, rows = offers_C4B.shape
    out = torch.empty((2, rows), dtype=torch.int32, device=offers_C4B.device)
    if rows:
        _settle[(rows,)](offers_C4B, out, rows, count, triton.next_power_of_2(count), num_warps=1)
    return out


@triton.jit(do_not_specialize=["rows", "width", "offset", "young"])
def _offer(
    logits_ptr,
    row_seed_ptr,
    count_ptr,
    out_ptr,
    rows,
    width,
    row_stride,
    offset,
    factor,
    young,
    GREEDY: tl.constexpr,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + at, mask=inside, other=float("-inf")) * factor
    noisy = x
    for i in tl.static_range(len(STOPS)):
        forbidden = (at + offset == STOPS[i]) & (tl.load(count_ptr + row) < young)
        noisy = tl.where(forbidden, float("-inf"), noisy)
    if not GREEDY:
        key = _mixed_64(
            tl.load(row_seed_ptr + row).to(tl.uint64, bitcast=True)
            + tl.load(count_ptr + row).to(tl.uint64)
            + _GOLDEN
        )
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        bits = _mixed_32((_mixed_32((at + offset + 1).to(tl.uint32)) ^ low) * (high | 1))
        v = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _UNIT
        noisy -= tl.log(-_log1m(v))
    best, index = tl.max(noisy, 0, return_indices=True)
    top = tl.max(x, 0)
    total = tl.sum(tl.where(inside, tl.exp(x - top), 0.0), 0)
    to = out_ptr + block * (4 * rows) + row
    tl.store(to, best)
    tl.store(to + rows, (block * BLOCK + index + offset).to(tl.float32))
    tl.store(to + 2 * rows, tl.sum(tl.where(at == block * BLOCK + index, x, 0.0), 0))
    tl.store(to + 3 * rows, tl.where(width > 0, top + tl.log(total), float("-inf")))


@triton.jit(do_not_specialize=["rows", "count"])
def _settle(offers_ptr, out_ptr, rows, count, COUNT: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, COUNT)
    here = offers_ptr + c * (4 * rows) + row
    inside = c < count
    best = tl.load(here, mask=inside, other=float("-inf"))
    totals = tl.load(here + 3 * rows, mask=inside, other=float("-inf"))
    winner = tl.argmax(best, 0)
    from_ptr = offers_ptr + winner * (4 * rows) + row
    top = tl.max(totals, 0)
    logprob = tl.load(from_ptr + 2 * rows) - (top + tl.log(tl.sum(tl.exp(totals - top), 0)))
    tl.store(out_ptr + row, tl.load(from_ptr + rows).to(tl.int32))
    tl.store(out_ptr + rows + row, logprob.to(tl.int32, bitcast=True))


@triton.jit
def _mixed_64(x):
    x = (x ^ (x >> 30)) * _MIX_64_A
    x = (x ^ (x >> 27)) * _MIX_64_B
    return x ^ (x >> 31)


@triton.jit
def _mixed_32(x):
    x = (x ^ (x >> 16)) * _MIX_32_A
    x = (x ^ (x >> 15)) * _MIX_32_B
    return x ^ (x >> 16)


@triton.jit
def _log1m(v):
    """log(1 - v) without the loss of digits for small v (Kahan)."""
    rest = 1.0 - v
    return tl.where(rest == 1.0, -v, tl.log(rest) * (-v / (rest - 1.0)))
