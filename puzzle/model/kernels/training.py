# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""`fused` with gradients: forward passes are its kernels, backward passes one kernel each.

What torch.compile makes of these backward passes for PPO's batches took 6 to 20 times what their bytes take
(H200, 7B; docs/performance.md), has to be compiled first, and its calls take longer on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.kernels import inference as fused
from puzzle.model.pointwise import Pointwise

ROWS = 16
"""Tokens whose part of a norm's weight gradient one program adds up."""

Sum = Callable[[Tensor], Tensor]


def kernels(plain: Pointwise) -> Pointwise:
    """For passes with gradients; heads that are normed (Qwen3's) are those of `plain`."""
    return Pointwise(add_norm, partial(heads, plain.heads), gated)


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, add: Sum = lambda parts: parts.sum(0)
) -> tuple[Tensor, Tensor]:
    """x + y (or x) and its root-mean-square norm, (T, D) each.

    `add` adds up the weight's gradient over (blocks of `ROWS` tokens, D).
    """
    return _AddNorm.apply(x, y, weight, eps, add)


def heads(
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]],
    qkv: Tensor,
    kv_groups: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, h), rotated keys and values (T, K, h)."""
    if q_norm is not None:
        return plain(qkv, kv_groups, cos, sin, q_norm, k_norm, eps)
    return _Heads.apply(qkv, kv_groups, cos, sin)


def gated(gate_up: Tensor, blocks: int) -> Tensor:
    """silu(gate) * up, (T, F)."""
    return _Gated.apply(gate_up, blocks)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float, add: Sum
    ) -> tuple[Tensor, Tensor]:
        total, normed = fused.add_norm(x, y, weight, eps)
        ctx.eps, ctx.summed, ctx.add = eps, y is not None, add
        ctx.save_for_backward(total, weight)
        return (total if ctx.summed else x), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        total, weight = ctx.saved_tensors
        grad_total, grad_normed = (grad.contiguous() for grad in grads)
        rows, width = total.shape
        grad = torch.empty_like(total)
        programs = triton.cdiv(rows, ROWS)
        parts = torch.empty((programs, width), dtype=torch.float32, device=total.device)
        if rows:
            block = triton.next_power_of_2(width)
            _add_norm_backward[(programs,)](
                *(total, weight, grad_total, grad_normed, grad, parts, rows, width, ctx.eps, ROWS, block),
                num_warps=fused.warps(block),
            )
        return grad, (grad if ctx.summed else None), ctx.add(parts).to(weight.dtype), None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, kv_groups: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.kv_groups = kv_groups
        q, k, v = fused.heads(qkv, kv_groups, cos, sin, None, None, 0.0)
        return q, k, v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = (grad.contiguous() for grad in grads)
        tokens, groups, dim = len(grad_q), ctx.kv_groups, cos.shape[-1]
        queries = grad_q.shape[1] // groups
        every = groups * (queries + 2)
        out = grad_q.new_empty((tokens, every * dim))
        block, half = min(16, triton.next_power_of_2(every)), triton.next_power_of_2(dim // 2)
        if tokens:
            _heads_backward[(tokens, triton.cdiv(every, block))](
                *(grad_q, grad_k, grad_v, cos, sin, out, every, queries, dim, block, half),
                num_warps=fused.warps(2 * block * half),
            )
        return out, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, blocks: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.blocks = blocks
        return fused.gated(gate_up, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,), grad = ctx.saved_tensors, grads[0].contiguous()
        out = torch.empty_like(gate_up)
        fused.over_gates(_gated_backward, grad.shape, ctx.blocks, gate_up, grad, out)
        return out, None


@triton.jit(do_not_specialize=["rows"])
def _add_norm_backward(
    total_ptr,
    weight_ptr,
    grad_total_ptr,
    grad_normed_ptr,
    grad_ptr,
    parts_ptr,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With n = x r, r = 1 / rms: dx = r (g w - n mean(g w n)), and the sum's own gradient; dw = sum(g n)."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        here, used = row * width + at, inside & (row < rows)
        x = tl.load(total_ptr + here, mask=used, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
        grad = tl.load(grad_normed_ptr + here, mask=used, other=0.0).to(tl.float32)
        normed = x * scale
        part += grad * normed
        grad *= weight
        grad = scale * (grad - normed * (tl.sum(grad * normed, 0) / width))
        grad += tl.load(grad_total_ptr + here, mask=used, other=0.0).to(tl.float32)
        tl.store(grad_ptr + here, grad, mask=used)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * width + at, part, mask=inside)


@triton.jit
def _heads_backward(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token, BLOCK of its heads, by halves: queries and keys turn back, values stay as they are."""
    groups: tl.constexpr = HEADS // (QUERIES + 2)
    half: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF)
    group, part = head // (QUERIES + 2), head % (QUERIES + 2)
    inside = (head < HEADS)[:, None] & (d < half)[None, :]
    is_query, is_key = inside & (part < QUERIES)[:, None], inside & (part == QUERIES)[:, None]
    is_value = inside & (part > QUERIES)[:, None]
    query = grad_q_ptr + (token * groups * QUERIES + group * QUERIES + part)[:, None] * DIM + d[None, :]
    single = (token * groups + group)[:, None] * DIM + d[None, :]
    a = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
    b = tl.load(query + half, mask=is_query, other=0.0).to(tl.float32)
    a += tl.load(grad_k_ptr + single, mask=is_key, other=0.0).to(tl.float32)
    b += tl.load(grad_k_ptr + single + half, mask=is_key, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * DIM + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * DIM + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    back_a, back_b = a * cos + b * sin, b * cos - a * sin
    back_a += tl.load(grad_v_ptr + single, mask=is_value, other=0.0).to(tl.float32)
    back_b += tl.load(grad_v_ptr + single + half, mask=is_value, other=0.0).to(tl.float32)
    into = out_ptr + (token * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(into, back_a, mask=inside)
    tl.store(into + half, back_b, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _gated_backward(
    gate_up_ptr,
    grad_ptr,
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
    both = token[:, None] * (2 * BLOCKS * SIZE) + block * (2 * SIZE) + at[None, :]
    gate = tl.load(gate_up_ptr + both, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + both + SIZE, mask=inside, other=0.0).to(tl.float32)
    given = token[:, None] * (BLOCKS * SIZE) + block * SIZE + at[None, :]
    grad = tl.load(grad_ptr + given, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + both, grad * up * share * (1.0 + gate * (1.0 - share)), mask=inside)
    tl.store(out_ptr + both + SIZE, grad * gate * share, mask=inside)
