# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""Gradients of `invariant_attention.packed`, one kernel for queries and one for keys and values: each number
is added up by one program, in one order (Dao 2023). Suffixes as there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.kernels.invariant_attention_blocks import Tile, first, fitting, seen_of, width_of
from puzzle.model.packing import PackedBatch

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
QUERY_TILES = (Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))
KEY_TILES = (Tile(32, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1))
"""Of both kernels: what was quickest on an H200 for heads of 128 (`puzzle bench numerics`), and smaller ones
for wider heads; the first that fits into shared memory."""
SINGLE = (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1))
"""In float32, without matrix units, where large ones take long to compile."""


class Saved(NamedTuple):
    """What a packed pass keeps: queries, keys, values, outputs (T, heads, h), logarithms of sums (T, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    sums: Tensor
    batch: PackedBatch
    window: int | None


def of_queries(saved: Saved, grad: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of the queries, and float32 (T, H) outputs times `grad`, their own gradients."""
    q, k, v, out, sums, batch, window = saved
    grad_q, delta = torch.empty_like(q), torch.empty_like(sums)
    tiles = SINGLE if q.itemsize > 2 else QUERY_TILES
    tile = tile or fitting(tiles, q, lambda t: 2 * t.queries + 2 * t.stages * t.keys)
    if q.numel():
        _backward_q[over(batch, q.shape[1], tile.queries)](
            *(q, k, v, out, grad, sums, delta, grad_q, batch.cu_seqlens, *strides(q, k, v)),
            *(*shape_of(q, k, window), tile.queries, tile.keys),
            **tile.options,
        )
    return grad_q, delta


def of_keys(saved: Saved, grad: Tensor, delta: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values; `delta` as from `of_queries`."""
    q, k, v, _, sums, batch, window = saved
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(k)
    tiles = SINGLE if q.itemsize > 2 else KEY_TILES
    tile = tile or fitting(tiles, q, lambda t: 2 * t.keys + 2 * t.stages * t.queries)
    if k.numel():
        _backward_k[over(batch, k.shape[1], tile.keys)](
            *(q, k, v, grad, sums, delta, grad_k, grad_v, batch.cu_seqlens, *strides(q, k, v)),
            *(*shape_of(q, k, window), tile.queries, tile.keys),
            **tile.options,
        )
    return grad_k, grad_v


def over(batch: PackedBatch, heads: int, rows: int) -> tuple[int, int, int]:
    """Programs: `rows` tokens of a segment, one head each."""
    return triton.cdiv(batch.max_len, rows), len(batch.segments), heads


def strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """From token to token, of values also from head to head: the others are contiguous."""
    return q.stride(0), k.stride(0), v.stride(0), v.stride(1)


def shape_of(q: Tensor, k: Tensor, window: int | None) -> tuple[float, int, int, int, int]:
    """Scale of scores as powers of two; queries of a kv head, head_dim, that rounded up, window or 0."""
    dim = q.shape[2]
    return LOG2_E / dim**0.5, q.shape[1] // k.shape[1], dim, width_of(q), window or 0


@triton.jit
def _backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    sums_ptr,
    delta_ptr,
    grad_q_ptr,
    starts_ptr,
    q_token,
    k_token,
    v_token,
    v_head,
    scale,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some queries, and `delta`: their outputs times the outputs' gradients."""
    head, heads = tl.program_id(2), tl.num_programs(2)
    start = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(1) + 1) - start).to(tl.int32)
    begin = tl.program_id(0) * ROWS
    if begin < length:
        d = tl.arange(0, WIDTH)
        position = begin + tl.arange(0, ROWS)
        here = (position < length)[:, None] & (d < DIM)[None, :]
        place = (start + position)[:, None] * q_token + head * DIM + d[None, :]
        q = tl.load(q_ptr + place, mask=here, other=0.0)
        grad = tl.load(grad_ptr + place, mask=here, other=0.0)
        out = tl.load(out_ptr + place, mask=here, other=0.0)
        row = (start + position) * heads + head
        total = tl.load(sums_ptr + row, mask=position < length, other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(delta_ptr + row, delta, mask=position < length)
        k = k_ptr + start * k_token + head // QUERIES * DIM
        v = v_ptr + start * v_token + head // QUERIES * v_head
        grad_q = tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(first(begin, WINDOW, KEYS), tl.minimum(begin + ROWS, length), KEYS):
            n = at + tl.arange(0, KEYS)
            inside = (n < length)[:, None] & (d < DIM)[None, :]
            keys = tl.load(k + n.to(tl.int64)[:, None] * k_token + d[None, :], mask=inside, other=0.0)
            values = tl.load(v + n.to(tl.int64)[:, None] * v_token + d[None, :], mask=inside, other=0.0)
            s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            p = tl.exp2(s - total[:, None])
            p = tl.where(seen_of(n[None, :], position[:, None], WINDOW), p, 0.0)
            slope = p * (tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None])
            grad_q = tl.dot(slope.to(q.dtype), keys, grad_q, input_precision="ieee")
        tl.store(grad_q_ptr + place, grad_q * (scale / _LOG2_E), mask=here)


@triton.jit
def _backward_k(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    sums_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    starts_ptr,
    q_token,
    k_token,
    v_token,
    v_head,
    scale,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of some keys and values of one kv head, over its query heads and their tokens in order."""
    group = tl.program_id(2)
    heads = tl.num_programs(2) * QUERIES
    start = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(1) + 1) - start).to(tl.int32)
    begin = tl.program_id(0) * KEYS
    if begin < length:
        d = tl.arange(0, WIDTH)
        n = begin + tl.arange(0, KEYS)
        here = (n < length)[:, None] & (d < DIM)[None, :]
        place = (start + n)[:, None] * k_token + group * DIM + d[None, :]
        keys = tl.load(k_ptr + place, mask=here, other=0.0)
        values = v_ptr + (start + n)[:, None] * v_token + group * v_head + d[None, :]
        values = tl.load(values, mask=here, other=0.0)
        grad_k = tl.zeros([KEYS, WIDTH], tl.float32)
        grad_v = tl.zeros([KEYS, WIDTH], tl.float32)
        stop = length
        if WINDOW > 0:
            stop = tl.minimum(length, begin + KEYS + WINDOW - 1)
        for query in range(QUERIES):
            head = group * QUERIES + query
            for at in range(begin, stop, ROWS):
                position = at + tl.arange(0, ROWS)
                inside = (position < length)[:, None] & (d < DIM)[None, :]
                at_q = (start + position)[:, None] * q_token + head * DIM + d[None, :]
                q = tl.load(q_ptr + at_q, mask=inside, other=0.0)
                grad = tl.load(grad_ptr + at_q, mask=inside, other=0.0)
                row = (start + position) * heads + head
                total = tl.load(sums_ptr + row, mask=position < length, other=0.0)
                delta = tl.load(delta_ptr + row, mask=position < length, other=0.0)
                seen = seen_of(n[:, None], position[None, :], WINDOW) & (position < length)[None, :]
                grad_k, grad_v = _of_block(keys, values, q, grad, total, delta, seen, scale, grad_k, grad_v)
        tl.store(grad_k_ptr + place, grad_k * (scale / _LOG2_E), mask=here)
        tl.store(grad_v_ptr + place, grad_v, mask=here)


@triton.jit
def _of_block(keys, values, q, grad, total, delta, seen, scale, grad_k, grad_v):
    """Gradients of keys and values, those from a block of queries added.

    Weights have keys as rows, as what they are multiplied by asks for.
    """
    s = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale
    p = tl.where(seen, tl.exp2(s - total[None, :]), 0.0)
    grad_v = tl.dot(p.to(q.dtype), grad, grad_v, input_precision="ieee")
    slope = p * (tl.dot(values, tl.trans(grad), input_precision="ieee") - delta[None, :])
    return tl.dot(slope.to(q.dtype), q, grad_k, input_precision="ieee"), grad_v
