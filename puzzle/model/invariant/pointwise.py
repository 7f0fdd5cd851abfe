"""Norms, rotations and gates, each number computed by itself; gradients of what all tensor ranks hold alike.

Elementwise operations of a CPU may round the ends of a vector in another way where they fuse a product and a
sum or approximate: so these are single steps, and of functions only those whose value is the same in all
places (exp, sqrt; not sigmoid, which torch approximates). Suffixes as in `model.pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puzzle.model.invariant.sums import across, equal_parts, over_tokens, tree_sum
from puzzle.model.parallel import TensorGroup
from puzzle.model.pointwise import Pointwise, has_kernels, kernels

Sum = Callable[[Tensor], Tensor]
"""Adds up a weight's gradient over the rows of a pass, those of other tensor ranks included."""


def pointwise(device: torch.device, group: TensorGroup, parts: int) -> Pointwise:
    """For passes of which a rank has `parts` / tp of the equal parts."""
    plain_heads = partial(heads, group=group, parts=parts)
    if not has_kernels(device):
        return Pointwise(partial(add_norm, group=group, parts=parts), plain_heads, gated)
    if not torch.is_grad_enabled():
        return replace(kernels(), decode=None, stores=True)
    from puzzle.model.kernels import training as fused

    def add(blocks: Tensor) -> Tensor:
        return replicated(over_tokens(blocks, group, parts), group)

    return Pointwise(
        partial(fused.add_norm, add=add),
        partial(fused.heads, partial(normed_heads, plain_heads)),
        fused.gated,
    )


def normed_heads(
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]], *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`heads` as a pass without gradients computes them, with the gradients of `plain`."""
    return _NormedHeads.apply(plain, *given)


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plain, ctx.given = plain, [x.detach() if isinstance(x, Tensor) else x for x in given]
        q, k, v = kernels().heads(*ctx.given)
        return q, k, v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        qkv, groups, cos, sin, q_norm, k_norm, eps = ctx.given
        leaves = [x.requires_grad_() for x in (qkv, q_norm, k_norm)]
        with torch.enable_grad():
            out = ctx.plain(qkv, groups, cos, sin, q_norm, k_norm, eps)
        grad_qkv, grad_q_norm, grad_k_norm = torch.autograd.grad(out, leaves, grads)
        return None, grad_qkv, None, None, None, grad_q_norm, grad_k_norm, None


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, group: TensorGroup, parts: int
) -> tuple[Tensor, Tensor]:
    """x + y (or x) and its root-mean-square norm, (T, D) each."""
    total = x if y is None else x + y
    return total, _Norm.apply(total, weight, eps, group, lambda grad: over_tokens(grad, group, parts))


def heads(
    qkv: Tensor,
    kv_groups: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    group: TensorGroup,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `pointwise.heads`."""
    qkv = qkv.view(qkv.shape[0], kv_groups, -1, cos.shape[-1])
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), 2)
    if q_norm is not None and k_norm is not None:

        def over_heads(grad: Tensor) -> Tensor:
            """Heads are cut over ranks, tokens are not: parts are kv groups."""
            here = equal_parts(kv_groups, group, parts)
            mine = grad.transpose(0, 1).reshape(here, -1, grad.shape[-1])
            return across(tree_sum(tree_sum(mine, 1), 0), group, sharded=False)

        q, k = (_Norm.apply(x, w, eps, group, over_heads) for x, w in ((q, q_norm), (k, k_norm)))
    return _rotated(q, cos, sin).flatten(1, 2), _rotated(k, cos, sin).flatten(1, 2), v[:, :, 0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = x.roll(x.shape[-1] // 2, -1)
    return (x.float() * cos.float() + turned.float() * sin.float()).to(x.dtype)


def gated(gate_up: Tensor, blocks: int) -> Tensor:
    """As `pointwise.gated`."""
    gate, up = gate_up.view(gate_up.shape[0], blocks, 2, -1).unbind(2)
    return _Gated.apply(gate, up).flatten(1)


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight. Of the weight's gradient, the sum over all ranks, the first one keeps all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: TensorGroup, add: Sum) -> Tensor:
        wide = x.float()
        scale = 1 / torch.sqrt(tree_sum(wide * wide, -1) / x.shape[-1] + eps)[..., None]
        ctx.save_for_backward(x, weight, scale)
        ctx.group, ctx.add = group, add
        return (wide * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grads[0].float()
        grad_weight = replicated(ctx.add(grad * normed), ctx.group)
        grad = grad * weight.float()
        along = tree_sum(grad * normed, -1)[..., None] / x.shape[-1]
        return ((grad - normed * along) * scale).to(x.dtype), grad_weight.to(weight.dtype), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        wide = gate.float()
        return (wide / (1 + torch.exp(-wide)) * up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.float() for x in ctx.saved_tensors)
        grad = grads[0].float()
        share = 1 / (1 + torch.exp(-gate))
        slope = share * (1 + gate * (1 - share))
        return (grad * up * slope).to(grads[0].dtype), (grad * gate * share).to(grads[0].dtype)


class Add(torch.autograd.Function):
    """x (rows, D) + a bias that all tensor ranks hold, with a gradient as `_Norm`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, group: TensorGroup, add: Sum) -> Tensor:
        ctx.group, ctx.add, ctx.dtype = group, add, bias.dtype
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grads[0], replicated(ctx.add(grads[0].float()), ctx.group).to(ctx.dtype), None, None


def replicated(gradient: Tensor, group: TensorGroup) -> Tensor:
    """What a rank gives of the gradient of a weight that the group holds alike: its holders' are summed."""
    return gradient if group.rank == 0 else torch.zeros_like(gradient)
