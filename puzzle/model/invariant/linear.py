"""Column- and row-parallel products and their gradients, the same for every tensor parallelism that divides
the parts.

A sum that tensor parallelism cuts (over the inputs of a row-parallel product, over the outputs of a
column-parallel one in its backward pass) is cut into `parts` on every layout. A rank adds those it has, and
the ranks' sums go on in the same tree, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puzzle.model.invariant.products import product
from puzzle.model.invariant.sums import across, equal_parts, tree_sum
from puzzle.model.linear import weight_gradient
from puzzle.model.parallel import TensorGroup


def column(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup, parts: int, sharded: bool
) -> Tensor:
    """As `parallel.column_linear`."""
    return _Column.apply(x, weight, bias, group, parts, sharded)


def row(x: Tensor, weight_transposed: Tensor, group: TensorGroup, parts: int, sharded: bool) -> Tensor:
    """x @ weight, summed over the group: the own T/tp rows if `sharded`, else all."""
    return _Row.apply(x, weight_transposed, group, parts, sharded)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: TensorGroup,
        parts: int,
        sharded: bool,
    ) -> Tensor:
        ctx.group, ctx.parts, ctx.biased = group, parts, bias is not None
        ctx.save_for_backward(x, weight)
        out = product(group.all_gather(x) if sharded else x, weight)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), group = grads, ctx.saved_tensors, ctx.group
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            here = equal_parts(len(weight), group, ctx.parts)
            grad_x = product(grad, weight.t(), here, _travels(x.dtype, group))
            grad_x = across(grad_x, group, sharded=True).to(x.dtype)
        if ctx.needs_input_grad[1]:
            x = x.detach()
            grad_weight = weight_gradient(weight, grad.t(), lambda: group.all_gather(x))
        if ctx.biased:
            grad_bias = tree_sum(grad.float(), 0).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: TensorGroup, parts: int, sharded: bool) -> Tensor:
        ctx.group, ctx.sharded = group, sharded
        ctx.save_for_backward(x, weight)
        out = product(x, weight.t(), equal_parts(len(weight), group, parts), _travels(x.dtype, group))
        return across(out, group, sharded).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad = ctx.group.all_gather(grads[0])
        grad_x = product(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(weight, x.detach().t(), lambda: grad)
        return grad_x, grad_weight, None, None, None


def _travels(dtype: torch.dtype, group: TensorGroup) -> torch.dtype:
    """Of a rank's sum: float32 where other ranks' are added to it, or else what it is rounded to at once."""
    return dtype if group.size == 1 else torch.float32
