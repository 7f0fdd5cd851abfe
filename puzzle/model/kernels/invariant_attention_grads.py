# ruff: noqa: ANN001, ANN201 (Triton reads the types of a kernel's arguments off its call)
"""Gradients of `invariant_attention.packed`, one kernel for queries and one for keys and values: each number
is added up by one program, in one order (Dao 2023). Suffixes as there."""

from __future__ import annotations

import triton
import triton.language as tl

from puzzle.model.kernels.invariant_attention_blocks import SIDE, first, seen_of

_SIDE = tl.constexpr(SIDE)


@triton.jit
def backward_q(
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
):
    """Gradients of 64 queries, and `delta`: their outputs times the outputs' gradients."""
    side: tl.constexpr = _SIDE
    head, heads = tl.program_id(2), tl.num_programs(2)
    start = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(1) + 1) - start).to(tl.int32)
    begin = tl.program_id(0) * side
    if begin < length:
        r, d = tl.arange(0, side), tl.arange(0, WIDTH)
        position = begin + r
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
        grad_q = tl.zeros([side, WIDTH], tl.float32)
        for at in range(first(begin, WINDOW, side), tl.minimum(begin + side, length), side):
            n = at + r
            inside = (n < length)[:, None] & (d < DIM)[None, :]
            keys = tl.load(k + n.to(tl.int64)[:, None] * k_token + d[None, :], mask=inside, other=0.0)
            values = tl.load(v + n.to(tl.int64)[:, None] * v_token + d[None, :], mask=inside, other=0.0)
            s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            p = tl.where(seen_of(n, position, WINDOW), tl.exp2(s - total[:, None]), 0.0)
            slope = p * (tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None])
            grad_q = tl.dot(slope.to(q.dtype), keys, grad_q, input_precision="ieee")
        tl.store(grad_q_ptr + place, grad_q * (scale / 1.4426950408889634), mask=here)


@triton.jit
def backward_k(
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
):
    """Gradients of 64 keys and values of one kv head, over its query heads and their tokens in order."""
    side: tl.constexpr = _SIDE
    group = tl.program_id(2)
    heads = tl.num_programs(2) * QUERIES
    start = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    length = (tl.load(starts_ptr + tl.program_id(1) + 1) - start).to(tl.int32)
    begin = tl.program_id(0) * side
    if begin < length:
        r, d = tl.arange(0, side), tl.arange(0, WIDTH)
        n = begin + r
        here = (n < length)[:, None] & (d < DIM)[None, :]
        place = (start + n)[:, None] * k_token + group * DIM + d[None, :]
        keys = tl.load(k_ptr + place, mask=here, other=0.0)
        values = v_ptr + (start + n)[:, None] * v_token + group * v_head + d[None, :]
        values = tl.load(values, mask=here, other=0.0)
        grad_k = tl.zeros([side, WIDTH], tl.float32)
        grad_v = tl.zeros([side, WIDTH], tl.float32)
        stop = length
        if WINDOW > 0:
            stop = tl.minimum(length, begin + side + WINDOW - 1)
        for query in range(QUERIES):
            head = group * QUERIES + query
            for at in range(begin, stop, side):
                position = at + r
                inside = (position < length)[:, None] & (d < DIM)[None, :]
                at_q = (start + position)[:, None] * q_token + head * DIM + d[None, :]
                q = tl.load(q_ptr + at_q, mask=inside, other=0.0)
                grad = tl.load(grad_ptr + at_q, mask=inside, other=0.0)
                row = (start + position) * heads + head
                total = tl.load(sums_ptr + row, mask=position < length, other=0.0)
                delta = tl.load(delta_ptr + row, mask=position < length, other=0.0)
                s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
                seen = seen_of(n, position, WINDOW) & (position < length)[:, None]
                p = tl.where(seen, tl.exp2(s - total[:, None]), 0.0)
                grad_v = tl.dot(tl.trans(p.to(q.dtype)), grad, grad_v, input_precision="ieee")
                slope = p * (tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None])
                grad_k = tl.dot(tl.trans(slope.to(q.dtype)), q, grad_k, input_precision="ieee")
        tl.store(grad_k_ptr + place, grad_k * (scale / 1.4426950408889634), mask=here)
        tl.store(grad_v_ptr + place, grad_v, mask=here)
