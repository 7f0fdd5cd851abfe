# ruff: noqa: ANN001, ANN201, ANN202, SIM102 (Triton reads the types of a kernel's arguments off its call)
"""What a layer computes between its matrices and its attention, as one Triton kernel each; no gradients.

The numbers are those of `pointwise`, but for roundings between steps that are left out here. torch.compile
fuses as well, but compiles again for shapes it has not seen, of which prompts bring many. Suffixes as in
`pointwise`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.attention import Slots


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (or x) and its root-mean-square norm, (T, D) each."""
    x = x.contiguous()
    total = x if y is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    rows, width = x.shape
    if rows:
        block = triton.next_power_of_2(width)
        given = x if y is None else y.contiguous()
        _add_norm[(rows,)](
            x, given, weight, total, normed, width, eps, y is not None, block, num_warps=warps(block)
        )
    return total, normed


def heads(
    qkv: Tensor,
    kv_groups: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, h), rotated keys and values (T, K, h); the latter two also go to `slots`."""
    tokens, head_dim = qkv.shape[0], cos.shape[-1]
    grouped = qkv.view(tokens, kv_groups, -1, head_dim)
    queries = grouped.shape[2] - 2
    q = qkv.new_empty((tokens, kv_groups * queries, head_dim))
    k = qkv.new_empty((tokens, kv_groups, head_dim))
    k_to, v_to, places_T, *_ = slots or (k, k, cos)
    count = len(places_T) if slots else 0
    every = kv_groups * (queries + 2)
    block = min(16, triton.next_power_of_2(every))
    half = triton.next_power_of_2(head_dim // 2)
    if tokens:
        _heads[(tokens, triton.cdiv(every, block))](
            *(qkv, cos, sin, cos if q_norm is None else q_norm, cos if k_norm is None else k_norm, q, k),
            *(k_to, v_to, places_T, count, k_to.stride(0)),
            *(eps, every, queries, head_dim, q_norm is not None, slots is not None, block, half),
            num_warps=warps(2 * block * half),
        )
    return q, k, grouped[:, :, -1]


def gated(gate_up: Tensor, blocks: int) -> Tensor:
    """silu(gate) * up, (T, F)."""
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    over_gates(_gated, out.shape, blocks, gate_up, out)
    return out


def over_gates(kernel: Any, shape: torch.Size, blocks: int, *tensors: Tensor) -> None:
    """Run a kernel over (T, F) gated values, which lie in `blocks` blocks."""
    tokens, width = shape
    size = width // blocks
    block = min(1024, triton.next_power_of_2(size))
    together = max(1, 1024 // block) if tokens >= 1024 else 1
    if tokens:
        grid = (triton.cdiv(tokens, together), blocks, triton.cdiv(size, block))
        kernel[grid](*tensors, tokens, blocks, size, together, block, num_warps=warps(block * together))


def warps(elements: int) -> int:
    """Warps for so many elements of a program: 8 to a thread."""
    return min(16, max(1, elements // 256))


@triton.jit
def _add_norm(
    x_ptr,
    y_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < width
    here = tl.program_id(0).to(tl.int64) * width + at
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + here, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + here, rounded, mask=inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    put_normed(normed_ptr + here, x, weight, width, eps, inside)


@triton.jit
def put_normed(to_ptr, x, weight, width, eps, inside):
    """Write the root-mean-square norm of a row of `width`, in float32 until then."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(to_ptr, x * scale * weight, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _heads(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    k_cache_ptr,
    v_cache_ptr,
    places_ptr,
    count,
    group_stride,
    eps,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token, BLOCK of its heads, by halves. A kv group's heads are its queries, its key, its value."""
    groups: tl.constexpr = HEADS // (QUERIES + 2)
    half: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF)
    group, part = head // (QUERIES + 2), head % (QUERIES + 2)
    inside = (head < HEADS)[:, None] & (d < half)[None, :]
    is_query, is_key = inside & (part < QUERIES)[:, None], inside & (part == QUERIES)[:, None]
    here = qkv_ptr + (token * HEADS + head)[:, None] * DIM + d[None, :]
    raw_a = tl.load(here, mask=inside, other=0.0)
    raw_b = tl.load(here + half, mask=inside, other=0.0)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)
        a *= scale[:, None]
        b *= scale[:, None]
        a *= _either(is_query, q_norm_ptr + d, k_norm_ptr + d, d < half)
        b *= _either(is_query, q_norm_ptr + half + d, k_norm_ptr + half + d, d < half)
        a, b = a.to(q_ptr.dtype.element_ty).to(tl.float32), b.to(q_ptr.dtype.element_ty).to(tl.float32)
    cos = tl.load(cos_ptr + token * DIM + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * DIM + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    query = q_ptr + (token * groups * QUERIES + group * QUERIES + part)[:, None] * DIM + d[None, :]
    _both(query, turned_a, turned_b, half, is_query)
    _both(k_ptr + (token * groups + group)[:, None] * DIM + d[None, :], turned_a, turned_b, half, is_key)
    if CACHED:
        if token < count:
            into = tl.load(places_ptr + token) * DIM + group[:, None].to(tl.int64) * group_stride + d[None, :]
            _both(k_cache_ptr + into, turned_a, turned_b, half, is_key)
            _both(v_cache_ptr + into, raw_a, raw_b, half, inside & (part > QUERIES)[:, None])


@triton.jit
def _both(ptr, a, b, half: tl.constexpr, inside):
    tl.store(ptr, a, mask=inside)
    tl.store(ptr + half, b, mask=inside)


@triton.jit
def _either(condition, a_ptr, b_ptr, inside):
    a = tl.load(a_ptr, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr, mask=inside, other=0.0).to(tl.float32)
    return tl.where(condition, a[None, :], b[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _gated(
    gate_up_ptr,
    out_ptr,
    tokens,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (at < SIZE)[None, :]
    block = tl.program_id(1)
    gate_at = gate_up_ptr + token[:, None] * (2 * BLOCKS * SIZE) + block * (2 * SIZE) + at[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + SIZE, mask=inside, other=0.0).to(tl.float32)
    into = out_ptr + token[:, None] * (BLOCKS * SIZE) + block * SIZE + at[None, :]
    tl.store(into, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)
