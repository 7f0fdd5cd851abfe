# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Attention of a decode pass as one Triton kernel: norm and rotation of the new heads, their way into the
cache, and one query per head against what its row has cached, and no more.

Lengths are read on the device: the launch is the same whatever they are, as a CUDA graph asks. Where rows
and kv heads are too few to fill the device, a row's positions are cut into parts that a second kernel joins
(flash-decoding, Dao et al. 2023). Suffixes: B rows, H query heads, K key/value heads, P pages, S positions
of a page, h head_dim.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.attention import Slots

MOST_PARTS = 16


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots: Slots,
    position_B: Tensor,
    window: int | None,
) -> Tensor:
    """(B, H h) for the columns of `qkv` (B, (H + 2 K) h), interleaved by kv group as in `pointwise.heads`.

    Line b is row b of `slots.table_BP`, its new token is at `position_B` (int64). Its key and value go to
    `slots.places[b]`; the query sees the `window` last positions up to there (all if None). ValueError unless
    a page has a power of two of positions, 16 or more.
    """
    k_KPSh, v_KPSh, place_B, table_BP, *_ = slots
    groups, _, page, dim = k_KPSh.shape
    if table_BP is None or page < 16 or page & (page - 1):
        raise ValueError(f"no decode pass over pages of {page} positions")
    rows, capacity = len(table_BP), table_BP.shape[1] * page
    queries = qkv.shape[1] // (groups * dim) - 2
    out = qkv.new_empty((rows, groups * queries * dim))
    parts = _parts(rows * groups, capacity, qkv.device)
    scratch = out
    if parts > 1:
        scratch = qkv.new_empty((parts, rows * groups * queries, dim + 2), dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(dim))
    # 32 KiB of keys under way while the block before them is used; an H100 is busy with that.
    block = max(16, min(128, page, (1 << 14) // padded * 2 // qkv.dtype.itemsize))
    q_weight, k_weight = (cos, cos) if q_norm is None or k_norm is None else (q_norm, k_norm)
    _attend[(rows * groups, parts)](
        *(qkv, cos, sin, q_weight, k_weight, k_KPSh, v_KPSh, position_B, place_B, table_BP, scratch),
        *(rows, k_KPSh.stride(0), table_BP.stride(0), eps, 1.4426950408889634 / dim**0.5),
        *(groups, queries, max(16, triton.next_power_of_2(queries)), dim, padded, block, page),
        *(window or 0, parts, q_norm is not None),
        num_warps=4,
    )
    if parts > 1:
        lines = rows * groups * queries
        _join[(lines,)](scratch, out, lines, dim, padded, parts, num_warps=1)
    return out


def _parts(programs: int, capacity: int, device: torch.device) -> int:
    """Parts that every row is cut into: so many that the device has four programs per multiprocessor.

    A power of two, with 128 positions to a part at least.
    """
    wanted = -(-4 * _multiprocessors(device) // programs)
    room = 1 << max(1, capacity // 128).bit_length() - 1
    return min(MOST_PARTS, triton.next_power_of_2(wanted), room)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["rows"])
def _attend(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    place_ptr,
    table_ptr,
    to_ptr,
    rows,
    group_stride,
    table_stride,
    eps,
    scale,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """One kv head of a row, one part of its positions. Softmax in base 2, in float32: maxima m, weights n.

    Its queries go through the matrix units together, filled up with zeros to the size that these ask for. A
    single one does, too: the copies into shared memory that feed the units keep the memory busiest.
    """
    row, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    part, table = tl.program_id(1), table_ptr + row * table_stride
    d = tl.arange(0, WIDTH)
    position = tl.load(position_ptr + row).to(tl.int32)
    first, start, stop = _part(position, part, PARTS, WINDOW, BLOCK)
    owner = part == 0  # has the new token
    heads_ptr = qkv_ptr + row * (GROUPS * (QUERIES + 2) * DIM) + group * ((QUERIES + 2) * DIM)
    cos = tl.load(cos_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    element = k_ptr.dtype.element_ty
    key = _turned(heads_ptr + QUERIES * DIM, 1, k_norm_ptr, cos, sin, eps, 1, DIM, WIDTH, NORM, element)
    value = tl.load(heads_ptr + (QUERIES + 1) * DIM + d, mask=d < DIM, other=0.0)
    k, v = k_ptr + group.to(tl.int64) * group_stride, v_ptr + group.to(tl.int64) * group_stride
    if owner:
        place = tl.load(place_ptr + row) * DIM
        tl.store(k + place + d, tl.sum(key, 0), mask=d < DIM)
        tl.store(v + place + d, value, mask=d < DIM)
    q = _turned(heads_ptr, QUERIES, q_norm_ptr, cos, sin, eps, PADDED, DIM, WIDTH, NORM, element)
    m = tl.where(owner, tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale, -1e30)
    n = tl.where(owner, 1.0, 0.0) + tl.zeros([PADDED], tl.float32)
    out = n[:, None] * value.to(tl.float32)[None, :]
    m, n, out = _over(q, k, v, table, first, start, stop, scale, m, n, out, DIM, WIDTH, BLOCK, PAGE, WINDOW)
    line = ((part * rows + row) * GROUPS + group) * QUERIES
    _put(to_ptr, line, m, n, out, QUERIES, PADDED, DIM, WIDTH, PARTS)


@triton.jit
def _part(position, part, PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The first position that is seen, and those of a part: the first, in whole blocks, and the one behind
    the last."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0)
    begin = first // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(position - begin, PARTS), BLOCK) * BLOCK
    start = begin + part * share
    return first, start, tl.minimum(start + share, position)


@triton.jit
def _over(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    start,
    stop,
    scale,
    tops,
    totals,
    sums,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Queries' maxima, weights and weighted sums of values, those of positions [start, stop) added.

    A block lies in one page, whose number is loaded a block ahead: no copy waits for it.
    """
    d = tl.arange(0, WIDTH)
    inner = tl.arange(0, BLOCK)
    here = inner[:, None] * DIM + d[None, :]
    page = tl.load(table_ptr + start // PAGE, mask=start < stop, other=0).to(tl.int64)
    for at in tl.range(start, stop, BLOCK, num_stages=2):
        n = at + inner
        seen = n < stop
        if WINDOW > 0:
            seen = seen & (n >= first)
        inside = seen[:, None] & (d < DIM)[None, :]
        begin = (page * PAGE + at % PAGE) * DIM
        page = tl.load(table_ptr + (at + BLOCK) // PAGE, mask=at + BLOCK < stop, other=0).to(tl.int64)
        keys = tl.load(k_ptr + begin + here, mask=inside, other=0.0)
        values = tl.load(v_ptr + begin + here, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(seen[None, :], s, -1e30)
        highest = tl.maximum(tops, tl.max(s, 1))
        weights = tl.where(seen[None, :], tl.exp2(s - highest[:, None]), 0.0)
        fade = tl.exp2(tops - highest)
        totals = totals * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), values, sums * fade[:, None], input_precision="ieee")
        tops = highest
    return tops, totals, sums


@triton.jit
def _put(
    to_ptr,
    line,
    tops,
    totals,
    sums,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write attention from `line` on or, for one of several parts, what `_join` needs."""
    g = tl.arange(0, PADDED)
    d = tl.arange(0, WIDTH)
    inside = (g < QUERIES)[:, None] & (d < DIM)[None, :]
    if PARTS == 1:
        to = to_ptr + (line + g)[:, None] * DIM + d[None, :]
        tl.store(to, sums / totals[:, None], mask=inside)
    else:
        to = to_ptr + (line + g) * (DIM + 2)
        tl.store(to[:, None] + d[None, :], sums, mask=inside)
        tl.store(to + DIM, tops, mask=g < QUERIES)
        tl.store(to + DIM + 1, totals, mask=g < QUERIES)


@triton.jit
def _turned(
    ptr,
    heads,
    norm_ptr,
    cos,
    sin,
    eps,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    element: tl.constexpr,
):
    """Normed and rotated heads (PADDED, WIDTH), rounded as the cache is; zeros beyond the `heads` first."""
    g = tl.arange(0, PADDED)
    d = tl.arange(0, WIDTH)
    other = (d + DIM // 2) % DIM
    inside = (g < heads)[:, None] & (d < DIM)[None, :]
    x = tl.load(ptr + g[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(ptr + g[:, None] * DIM + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None]
        x = x * scale * tl.load(norm_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        turned = turned * scale * tl.load(norm_ptr + other, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        x, turned = x.to(element).to(tl.float32), turned.to(element).to(tl.float32)
    return (x * cos[None, :] + turned * sin[None, :]).to(element)


@triton.jit(do_not_specialize=["lines"])
def _join(scratch_ptr, out_ptr, lines, DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """One query's attention from those of its parts: sums (DIM), maximum, weight."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    p = tl.arange(0, PARTS)
    here = scratch_ptr + (p * lines + line) * (DIM + 2)
    tops = tl.load(here + DIM)
    fades = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(here + DIM + 1) * fades, 0)
    sums = tl.load(here[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    tl.store(out_ptr + line * DIM + d, tl.sum(sums * fades[:, None], 0) / total, mask=d < DIM)
