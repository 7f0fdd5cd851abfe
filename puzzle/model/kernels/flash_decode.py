# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Attention of a decode pass as one Triton kernel: norm and rotation of the new heads, their way into the
cache, and one query per head against what its row has cached, and no more.

Lengths are read on the device: the launch is the same whatever they are, as a CUDA graph asks. Where rows
and kv heads are too few to fill the device, a row's positions are cut into parts that a second kernel joins
(flash-decoding, Dao et al. 2023). What a family of rows shares is read once for all of them, by a kernel of
its own before (as in Hydragen, Juravsky et al. 2024). Suffixes: B rows, H query heads, K key/value heads, P
pages, S positions of a page, h head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.attention import MEMBERS, Slots
from puzzle.model.kernels import multiprocessors

MOST_PARTS = 16

PREFIX_UNDER_WAY = 32 << 10
"""Bytes of keys that `_prefix` loads while it uses those before."""


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
    under_way, warps = _under_way(queries, capacity)
    shape = (dim, padded, _block(under_way, page, padded, qkv.dtype), page)
    q_weight, k_weight = (cos, cos) if q_norm is None or k_norm is None else (q_norm, k_norm)
    numbers = (rows, k_KPSh.stride(0), table_BP.stride(0), eps, 1.4426950408889634 / dim**0.5)
    norm = q_norm is not None
    before, shared_B, shared = out, position_B, 0
    if slots.families is not None and window is None:
        members_FM, shared_B = slots.families
        shared = _parts(max(1, rows // MEMBERS) * groups, capacity, qkv.device)
        before = qkv.new_empty((shared, rows * groups * queries, dim + 2), dtype=torch.float32)
        some = min(MEMBERS, max(1, 64 // triton.next_power_of_2(queries)))
        families = (dim, padded, _block(PREFIX_UNDER_WAY, page, padded, qkv.dtype), page)
        _prefix[(len(members_FM) * (MEMBERS // some) * groups, shared)](
            *(qkv, cos, sin, q_weight, k_KPSh, v_KPSh, members_FM, table_BP, before, *numbers),
            *(groups, queries, some, MEMBERS, max(16, triton.next_power_of_2(some * queries)), *families),
            *(shared, norm),
            num_warps=4,
        )
    _attend[(rows * groups, parts)](
        *(qkv, cos, sin, q_weight, k_weight, k_KPSh, v_KPSh, position_B, place_B, table_BP, scratch),
        *(shared_B, before, *numbers),
        *(groups, queries, max(16, triton.next_power_of_2(queries)), *shape, window or 0, parts, shared),
        norm,
        num_warps=warps,
    )
    if parts > 1:
        lines = rows * groups * queries
        _join[(lines,)](scratch, out, lines, dim, padded, parts, num_warps=1)
    return out


def _under_way(queries: int, capacity: int) -> tuple[int, int]:
    """Bytes of keys that a program loads while it uses those before, and its warps.

    Small blocks leave room for many programs on a multiprocessor, which load while others wait, and waste
    little at a row's end; long rows, and several queries of a head, are faster with larger ones (measured on
    an H200).
    """
    return (8 << 10, 2) if queries == 1 and capacity <= 1024 else (16 << 10, 4)


def _block(under_way: int, page: int, padded: int, dtype: torch.dtype) -> int:
    """Positions of a block of `under_way` bytes."""
    return max(16, min(page, under_way // (padded * dtype.itemsize)))


def _parts(programs: int, capacity: int, device: torch.device) -> int:
    """Parts that every row is cut into: so many that the device has two programs per multiprocessor.

    A power of two, with 128 positions to a part at least.
    """
    wanted = -(-2 * multiprocessors(device) // programs)
    room = 1 << max(1, capacity // 128).bit_length() - 1
    return min(MOST_PARTS, triton.next_power_of_2(wanted), room)


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
    shared_ptr,
    before_ptr,
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
    SHARED: tl.constexpr,
    NORM: tl.constexpr,
):
    """One kv head of a row, one part of its positions; first those that it shares, which `_prefix` has read
    in `SHARED` parts. Softmax in base 2, in float32: maxima m, weights n."""
    row, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    part, owner = tl.program_id(1), tl.program_id(1) == 0  # who has the new token
    table = table_ptr + row * table_stride
    d, g = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    position, begin = tl.load(position_ptr + row).to(tl.int32), tl.load(shared_ptr + row) if SHARED > 0 else 0
    first, start, stop = _part(begin, position, part, PARTS, WINDOW, BLOCK)
    heads_ptr = qkv_ptr + row * (GROUPS * (QUERIES + 2) * DIM) + group * ((QUERIES + 2) * DIM)
    cos = tl.load(cos_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    k, v = k_ptr + group.to(tl.int64) * group_stride, v_ptr + group.to(tl.int64) * group_stride
    element = k_ptr.dtype.element_ty
    key, value = _new(heads_ptr + QUERIES * DIM, k_norm_ptr, cos, sin, eps, DIM, WIDTH, NORM, element)
    if owner:
        place = tl.load(place_ptr + row) * DIM
        tl.store(k + place + d, tl.sum(key, 0), mask=d < DIM)
        tl.store(v + place + d, value, mask=d < DIM)
    q = _turned(heads_ptr + g * DIM, g < QUERIES, q_norm_ptr, cos, sin, eps, DIM, WIDTH, NORM, element)
    m = tl.where(owner, tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale, -1e30)
    n = tl.where(owner, 1.0, 0.0) + tl.zeros([PADDED], tl.float32)
    out = n[:, None] * value.to(tl.float32)[None, :]
    for p in tl.static_range(SHARED):
        known_ptr = before_ptr + (((p * rows + row) * GROUPS + group) * QUERIES + g) * (DIM + 2)
        m, n, out = _with(known_ptr, (g < QUERIES) & owner & (begin > 0), m, n, out, DIM, WIDTH)
    m, n, out = _over(q, k, v, table, first, start, stop, scale, m, n, out, DIM, WIDTH, BLOCK, PAGE, WINDOW)
    line = ((part * rows + row) * GROUPS + group) * QUERIES
    _put(to_ptr, line, m, n, out, QUERIES, PADDED, DIM, WIDTH, PARTS)


@triton.jit(do_not_specialize=["rows"])
def _prefix(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_ptr,
    v_ptr,
    members_ptr,
    table_ptr,
    to_ptr,
    rows,
    group_stride,
    table_stride,
    eps,
    scale,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    SOME: tl.constexpr,
    MOST: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """One kv head of `SOME` rows of a family, one part of what they share: for `_attend` to go on from.

    The queries of all those rows go through the matrix units together. Who is in no family reads nothing.
    """
    some, group, part = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    members_ptr += some // (MOST // SOME) * (1 + MOST)
    d = tl.arange(0, WIDTH)
    g = tl.arange(0, PADDED)
    head = g % QUERIES
    member = some % (MOST // SOME) * SOME + g // QUERIES
    row = tl.load(members_ptr + 1 + member, mask=g < SOME * QUERIES, other=-1).to(tl.int64)
    count = tl.where(tl.max(row, 0) >= 0, tl.load(members_ptr), 0)
    used = (row >= 0) & (count > 0)
    table = table_ptr + tl.load(members_ptr + 1).to(tl.int64) * table_stride
    heads = qkv_ptr + row * (GROUPS * (QUERIES + 2) * DIM) + group * ((QUERIES + 2) * DIM) + head * DIM
    inside = used[:, None] & (d < DIM)[None, :]
    cos = tl.load(cos_ptr + row[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    element = k_ptr.dtype.element_ty
    q = _turned(heads, used, q_norm_ptr, cos, sin, eps, DIM, WIDTH, NORM, element)
    k, v = k_ptr + group.to(tl.int64) * group_stride, v_ptr + group.to(tl.int64) * group_stride
    m = tl.zeros([PADDED], tl.float32) - 1e30
    n = tl.zeros([PADDED], tl.float32)
    out = tl.zeros([PADDED, WIDTH], tl.float32)
    first, start, stop = _part(0, count, part, PARTS, 0, BLOCK)
    m, n, out = _over(q, k, v, table, first, start, stop, scale, m, n, out, DIM, WIDTH, BLOCK, PAGE, 0)
    to = to_ptr + (((part * rows + row) * GROUPS + group) * QUERIES + head) * (DIM + 2)
    tl.store(to[:, None] + d[None, :], out, mask=inside)
    tl.store(to + DIM, m, mask=used)
    tl.store(to + DIM + 1, n, mask=used)


@triton.jit
def _with(known_ptr, told, tops, totals, sums, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Queries' maxima, weights and weighted sums of values with what is known of other positions, where it
    is `told`; the pointers lead to the sums, behind which stand maximum and weight."""
    d = tl.arange(0, WIDTH)
    known = tl.load(known_ptr + DIM, mask=told, other=-1e30)
    more = tl.load(known_ptr + DIM + 1, mask=told, other=0.0)
    inside = told[:, None] & (d < DIM)[None, :]
    values = tl.load(known_ptr[:, None] + d[None, :], mask=inside, other=0.0)
    highest = tl.maximum(tops, known)
    old, new = tl.exp2(tops - highest), tl.exp2(known - highest)
    return highest, totals * old + more * new, sums * old[:, None] + values * new[:, None]


@triton.jit
def _part(begin, position, part, PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The first position that is seen, and those of a part of [begin, position): the first, in whole blocks,
    and the one behind the last."""
    first = begin
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

    Queries go through the matrix units together, filled up with zeros to the size that these ask for. A
    single one does, too: the copies into shared memory that feed the units keep the memory busiest. A block
    lies in one page, whose number is loaded a block ahead: no copy waits for it.
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
def _new(
    ptr,
    norm_ptr,
    cos,
    sin,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    element: tl.constexpr,
):
    """The new token's key (1, WIDTH), normed and rotated, and behind it its value (WIDTH)."""
    d, one = tl.arange(0, WIDTH), tl.arange(0, 1)
    key = _turned(ptr + one, one < 1, norm_ptr, cos, sin, eps, DIM, WIDTH, NORM, element)
    return key, tl.load(ptr + DIM + d, mask=d < DIM, other=0.0)


@triton.jit
def _turned(
    heads_ptr,
    used,
    norm_ptr,
    cos,
    sin,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    element: tl.constexpr,
):
    """Normed and rotated heads (n, WIDTH), rounded as the cache is, for `heads_ptr` (n,); zeros where they
    are not `used`."""
    d = tl.arange(0, WIDTH)
    other = (d + DIM // 2) % DIM
    inside = used[:, None] & (d < DIM)[None, :]
    x = tl.load(heads_ptr[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(heads_ptr[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None]
        x = x * scale * tl.load(norm_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        turned = turned * scale * tl.load(norm_ptr + other, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        x, turned = x.to(element).to(tl.float32), turned.to(element).to(tl.float32)
    return (x * cos + turned * sin).to(element)


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
