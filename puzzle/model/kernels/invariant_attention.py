# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Attention whose output for a query is the same from a packed pass and from a decode pass.

```
positions   0        64       128      ...     512      576
            |--block-|--block-|-- ...          |--block-|-- ...      blocks of 64, online softmax in a run
            |------------- run ----------------|------ run -----     runs of 512, joined from the first on
```

64 queries go through the matrix units at once: of a packed pass tokens, of a decode pass the query heads
of one kv head, filled up with zeros. Blocks and runs begin at the same positions of a sequence for all of
them, and keys that a query does not see change nothing. So packed and decode passes differ in who computes a
run (flash-attention, Dao 2023; flash-decoding, Dao et al. 2023) and not in the numbers.
Suffixes: T packed tokens, B rows, H query heads, K key/value heads, P pages, S positions of a page, h
head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.attention import Slots
from puzzle.model.kernels.invariant_attention_blocks import (
    SIDE,
    Tile,
    block,
    first,
    fitting,
    joined,
    seen_of,
    width_of,
)
from puzzle.model.kernels.invariant_attention_grads import (
    LOG2_E,
    Saved,
    of_keys,
    of_queries,
    over,
    shape_of,
    strides,
)
from puzzle.model.packing import PackedBatch

RUN = 512
TILES = (Tile(64, SIDE, 4, 3), Tile(64, SIDE, 4, 2), Tile(64, SIDE, 4, 1))
"""Of packed passes; the first that fits into shared memory. They change speed alone."""
DECODE = Tile(SIDE, SIDE, 4, 3)
"""Of decode passes."""
_SIDE, _RUN = tl.constexpr(SIDE), tl.constexpr(RUN)


def packed(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None) -> Tensor:
    """Causal attention inside each segment, over the last `window` tokens if given. Returns (T, H, h)."""
    return _Packed.apply(q_THh, k_TKh, v_TKh, batch, window)


def decode(
    q_BHh: Tensor, slots: Slots, position_B: Tensor, window: int | None, tile: Tile | None = None
) -> Tensor:
    """(B, H, h): one query per row, at `position_B` (int64), against what its row has cached up to there.

    `tile` has other warps and stages than were quickest. Lengths are read on the device. ValueError unless a
    page has a power of two of positions, 16 or more.
    """
    k_KPSh, v_KPSh, _, table_BP, *_ = slots
    groups, _, page, dim = k_KPSh.shape
    if table_BP is None or page < 16 or page & (page - 1):
        raise ValueError(f"no decode pass over pages of {page} positions")
    rows, heads = q_BHh.shape[:2]
    q_BHh = q_BHh.contiguous()
    out = torch.empty_like(q_BHh)
    runs = triton.cdiv(table_BP.shape[1] * page, RUN)
    scratch = out
    if runs > 1:
        scratch = torch.empty((runs, rows * heads, dim + 2), dtype=torch.float32, device=out.device)
    width = width_of(q_BHh)
    scale = LOG2_E / dim**0.5
    sizes = (heads // groups, dim, width)
    _decode[(rows * groups, runs)](
        *(q_BHh, k_KPSh, v_KPSh, position_B, table_BP, scratch, rows, k_KPSh.stride(0), table_BP.stride(0)),
        *(scale, groups, *sizes, page, window or 0, runs),
        **(tile or DECODE).options,
    )
    if runs > 1:
        _join[(rows * heads,)](
            scratch, position_B, out, rows * heads, heads, dim, width, window or 0, **DECODE.options
        )
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """`packed` without gradients, and for these the logarithms (base 2, float32 (T, H)) of its sums.

    `q` and `k` are contiguous. `tile` is what its size asks for, unless given.
    """
    out = torch.empty_like(q)
    sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile = tile or fitting(TILES, q, lambda t: t.queries + 2 * t.stages * t.keys)
    if q.numel():
        _forward[over(batch, q.shape[1], tile.queries)](
            *(q, k, v, out, sums, batch.cu_seqlens, *strides(q, k, v), batch.past),
            *(*shape_of(q, k, window), tile.queries),
            **tile.options,
        )
    return out, sums


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None) -> Tensor:
        q, k = q.contiguous(), k.contiguous()
        out, sums = attend(q, k, v, batch, window)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.batch, ctx.window = batch, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        saved, grad = Saved(*ctx.saved_tensors, ctx.batch, ctx.window), grads[0].contiguous()
        grad_q, delta = of_queries(saved, grad)
        return grad_q, *of_keys(saved, grad, delta), None, None


@triton.jit(do_not_specialize=["past"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    starts_ptr,
    q_token,
    k_token,
    v_token,
    v_head,
    past,
    scale,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some tokens of a segment, one head. The first segment goes on behind `past` keys."""
    side: tl.constexpr = _SIDE
    head = tl.program_id(2)
    start = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(1) + 1) - start).to(tl.int32)
    begin = tl.program_id(0) * ROWS
    if begin < length:
        r, d, block_at = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, side)
        inner = begin + r
        here = (inner < length)[:, None] & (d < DIM)[None, :]
        place = (start + inner)[:, None] * q_token + head * DIM + d[None, :]
        q = tl.load(q_ptr + place, mask=here, other=0.0)
        before = tl.where(tl.program_id(1) == 0, past, 0)
        k = k_ptr + (start + past - before) * k_token + head // QUERIES * DIM
        v = v_ptr + (start + past - before) * v_token + head // QUERIES * v_head
        position, keys_end = before + inner, before + length
        stop = tl.minimum(before + begin + ROWS, keys_end)
        tops = tl.full([ROWS], -1e30, tl.float32)
        totals = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for run in range(first(before + begin, WINDOW, _RUN), stop, _RUN):
            more_tops = tl.full([ROWS], -1e30, tl.float32)
            more_totals = tl.zeros([ROWS], tl.float32)
            more_sums = tl.zeros([ROWS, WIDTH], tl.float32)
            for at in range(run, tl.minimum(run + _RUN, stop), side):
                n = at + block_at
                inside = (n < keys_end)[:, None] & (d < DIM)[None, :]
                keys = tl.load(k + n.to(tl.int64)[:, None] * k_token + d[None, :], mask=inside, other=0.0)
                values = tl.load(v + n.to(tl.int64)[:, None] * v_token + d[None, :], mask=inside, other=0.0)
                seen = seen_of(n[None, :], position[:, None], WINDOW)
                more_tops, more_totals, more_sums = block(
                    q, keys, values, seen, more_tops, more_totals, more_sums, scale
                )
            tops, totals, sums = joined(tops, totals, sums, more_tops, more_totals, more_sums)
        tl.store(out_ptr + place, sums / totals[:, None], mask=here)
        heads = tl.num_programs(2)
        tl.store(sums_ptr + (start + inner) * heads + head, tops + tl.log2(totals), mask=inner < length)


@triton.jit(do_not_specialize=["rows"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    table_ptr,
    to_ptr,
    rows,
    group_stride,
    table_stride,
    scale,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The queries of one kv head of a row, one run of its positions."""
    side: tl.constexpr = _SIDE
    row, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    run = tl.program_id(1) * _RUN
    last = tl.load(position_ptr + row).to(tl.int32)
    if (run <= last) & (run >= first(last, WINDOW, _RUN)):
        r, d = tl.arange(0, side), tl.arange(0, WIDTH)
        line = (row * GROUPS + group) * QUERIES
        some = (r < QUERIES)[:, None] & (d < DIM)[None, :]
        q = tl.load(q_ptr + (line + r)[:, None] * DIM + d[None, :], mask=some, other=0.0)
        k, v = k_ptr + group.to(tl.int64) * group_stride, v_ptr + group.to(tl.int64) * group_stride
        table = table_ptr + row * table_stride
        position = last + 0 * r
        tops = tl.full([side], -1e30, tl.float32)
        totals = tl.zeros([side], tl.float32)
        sums = tl.zeros([side, WIDTH], tl.float32)
        for at in range(run, tl.minimum(run + _RUN, last + 1), side):
            n = at + r
            inside = (n <= last)[:, None] & (d < DIM)[None, :]
            if side <= PAGE:
                page = tl.load(table + at // PAGE).to(tl.int64)
                place = (page * PAGE + at % PAGE + r) * DIM
            else:
                page = tl.load(table + n // PAGE, mask=n <= last, other=0).to(tl.int64)
                place = (page * PAGE + n % PAGE) * DIM
            keys = tl.load(k + place[:, None] + d[None, :], mask=inside, other=0.0)
            values = tl.load(v + place[:, None] + d[None, :], mask=inside, other=0.0)
            tops, totals, sums = block(
                q, keys, values, seen_of(n[None, :], position[:, None], WINDOW), tops, totals, sums, scale
            )
        if RUNS == 1:
            none = tl.zeros([side], tl.float32)
            tops, totals, sums = joined(none - 1e30, none, sums * 0.0, tops, totals, sums)
            to = to_ptr + (line + r)[:, None] * DIM + d[None, :]
            tl.store(to, sums / totals[:, None], mask=some)
        else:
            to = to_ptr + (tl.program_id(1) * (rows * GROUPS * QUERIES) + line + r) * (DIM + 2)
            tl.store(to[:, None] + d[None, :], sums, mask=some)
            tl.store(to + DIM, tops, mask=r < QUERIES)
            tl.store(to + DIM + 1, totals, mask=r < QUERIES)


@triton.jit(do_not_specialize=["lines"])
def _join(
    from_ptr,
    position_ptr,
    out_ptr,
    lines,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One query's attention from its runs, the first of them first."""
    line = tl.program_id(0).to(tl.int64)
    last = tl.load(position_ptr + line // HEADS).to(tl.int32)
    d = tl.arange(0, WIDTH)
    tops = tl.full([1], -1e30, tl.float32)
    totals = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, WIDTH], tl.float32)
    for run in range(first(last, WINDOW, _RUN) // _RUN, last // _RUN + 1):
        here = from_ptr + (run * lines + line) * (DIM + 2)
        more_sums = tl.load(here + d, mask=d < DIM, other=0.0)[None, :]
        none = tl.zeros([1], tl.float32)
        more_tops, more_totals = tl.load(here + DIM) + none, tl.load(here + DIM + 1) + none
        tops, totals, sums = joined(tops, totals, sums, more_tops, more_totals, more_sums)
    out = tl.sum(sums / totals[:, None], 0)
    tl.store(out_ptr + line * DIM + d, out, mask=d < DIM)
