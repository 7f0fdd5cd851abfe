"""Attention whose outputs are the same from a packed pass and from decode passes over a cache.

A query's scores are products of `products`; the largest of them is exact, their exponentials are added as
a tree over positions, their values from the first position on, 64 at a time. Positions that a query does not
see have weight zero, which changes none of these sums, so that neither the length of a row nor of the cache
does.
Suffixes as in `model.attention`; Z rows times kv heads, R query heads of a kv head times positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puzzle.model.attention import Slots, to_rows
from puzzle.model.invariant.products import products
from puzzle.model.invariant.sums import pad_to, tree_sum
from puzzle.model.packing import DecodeBatch, PackedBatch
from puzzle.model.pointwise import has_kernels

DEPTH = 64
"""Positions whose values are one sum."""


def packed_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None
) -> Tensor:
    """As `model.attention.packed_attention`. Returns (T, H, h)."""
    if has_kernels(q_THh.device):
        from puzzle.model.kernels import invariant_attention

        return invariant_attention.packed(q_THh, k_TKh, v_TKh, batch, window)
    past, first = batch.past, batch.segments[0]
    q, k, v = (to_rows(x, batch) for x in (q_THh, k_TKh[past:], v_TKh[past:]))
    out = _rows_attention(q, k, v, window).flatten(0, 1)
    out = out if batch.regular else out.index_select(0, batch.token_rows)
    if past:
        going_on = (q_THh[None, :first], k_TKh[None, : past + first], v_TKh[None, : past + first])
        out = torch.cat((_rows_attention(*going_on, window)[0], out[first:]))
    return out


def _rows_attention(q_BRHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, window: int | None) -> Tensor:
    """(B, R, H, h) of the last R of S positions."""
    (rows, count, _, dim), (_, keys, groups, _) = q_BRHh.shape, k_BSKh.shape
    q = q_BRHh.view(rows, count, groups, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k_BSKh, v_BSKh))
    key = torch.arange(keys, device=q.device)
    query = key[keys - count :, None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    queries = q.shape[1] // count
    out = _Attention.apply(q, k, v, seen.repeat(queries, 1)[None])
    return out.view(rows, groups, queries, count, dim).permute(0, 3, 1, 2, 4).flatten(2, 3)


def decode_attention(q_BHh: Tensor, slots: Slots, batch: DecodeBatch, window: int | None) -> Tensor:
    """As `model.attention.decode_attention`. Returns (B, H, h)."""
    if has_kernels(q_BHh.device):
        from puzzle.model.kernels import invariant_attention

        return invariant_attention.decode(q_BHh, slots, batch.positions_T, window)
    k_BKSh, v_BKSh = slots.read(batch.reach)
    rows, groups = k_BKSh.shape[:2]
    q = q_BHh.reshape(rows * groups, -1, q_BHh.shape[-1])
    seen = batch.mask(window)[:, 0].expand(-1, groups, -1).reshape(rows * groups, 1, -1)
    out, _ = _attend(q, k_BKSh.flatten(0, 1), v_BKSh.flatten(0, 1), seen)
    return out.to(q_BHh.dtype).view(q_BHh.shape)


def _attend(q_ZRh: Tensor, k_ZSh: Tensor, v_ZSh: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """float32 attention (Z, R, h) and its weights (Z, R, S rounded up); `seen` is (1 or Z, 1 or R, S)."""
    scores = products(q_ZRh, k_ZSh).mul_(q_ZRh.shape[-1] ** -0.5).masked_fill_(~seen, -torch.inf)
    weights = pad_to(torch.exp(scores - scores.amax(2, keepdim=True)), DEPTH, -1)
    total = tree_sum(weights, 2)[..., None]
    values = pad_to(v_ZSh, DEPTH, -2).transpose(1, 2)
    return products(weights, values, DEPTH) / total, weights / total


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        out, weights = _attend(q, k, v, seen)
        ctx.save_for_backward(q, k, v, out, weights)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, weights = ctx.saved_tensors
        grad = grads[0].float()
        weights = weights[..., : k.shape[1]]
        slope = products(grad, v) - tree_sum(grad * out, 2)[..., None]
        slope = slope.mul_(weights).mul_(q.shape[-1] ** -0.5)
        grad_q = products(slope, k.transpose(1, 2))
        grad_k = products(slope.transpose(1, 2), q.transpose(1, 2))
        grad_v = products(weights.transpose(1, 2), grad.transpose(1, 2))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None
