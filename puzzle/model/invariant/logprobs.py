"""Log-probabilities that are the same however the vocabulary is cut, in training and where tokens are drawn.

The largest logit is exact; the exponentials below it are added as integers (`exact_sum`). Suffixes as in
`model.logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from puzzle.model.invariant.products import DEPTH, product
from puzzle.model.invariant.sums import across, exact_exponentials, exact_sum, tree_sum
from puzzle.model.logprobs import BLOCK, TokenStats
from puzzle.model.parallel import TensorGroup
from puzzle.spec.tensors import VocabSplit


def log_total(logits_NV: Tensor, group: TensorGroup) -> tuple[Tensor, Tensor]:
    """float32 (N,) each: the largest logit and the logarithm of the sum of all exponentials."""
    top_N = logits_NV.new_full((len(logits_NV),), -torch.inf)
    if logits_NV.shape[1]:
        top_N = logits_NV.amax(1)
    top_N = group.all_reduce_max(top_N)
    return top_N, top_N + exact_exponentials(logits_NV, top_N, group).log()


def token_stats(
    hidden_TD: Tensor,
    rows_N: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    group: TensorGroup,
    parts: int,
    rows: int,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenStats:
    """As `model.logprobs.token_stats`, after the tokens `rows_N` (of T) of hidden states (T/tp, D)."""
    offset = group.rank * weight_VD.shape[0]
    real = max(0, min(weight_VD.shape[0], rows - offset))
    logprobs, entropies = _TokenStats.apply(
        hidden_TD, rows_N, weight_VD, targets_N - offset, group, parts, real, 1.0 / temperature, entropy
    )
    return TokenStats(logprobs, entropies if entropy else None)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: TensorGroup,
        parts: int,
        real: int,
        scale: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        chosen = group.all_gather(hidden).index_select(0, rows)
        some = max(1, BLOCK // max(1, weight.shape[0] * group.size))
        done = [
            _forward(h, weight[:real], t, group, scale, entropy)
            for h, t in zip(chosen.split(some), targets.split(some), strict=True)
        ]
        logprobs, logsum, mean = map(torch.cat, zip(*done, strict=True))
        ctx.save_for_backward(hidden, rows, weight, targets, logsum, mean)
        ctx.group, ctx.parts, ctx.real, ctx.scale, ctx.entropy = group, parts, real, scale, entropy
        return logprobs, logsum - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows, weight, targets, logsum, mean = ctx.saved_tensors
        whole = ctx.group.all_gather(hidden)
        chosen = whole.index_select(0, rows)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        here = ctx.parts // ctx.group.size
        share = VocabSplit.chunk(len(weight) * ctx.group.size, ctx.parts)
        sums = chosen.new_zeros((here, *chosen.shape), dtype=torch.float32)
        for part, start, stop in _blocks(share, here, len(chosen), ctx.real):
            block = weight[start:stop]
            logits = product(chosen, block, dtype=torch.float32).mul_(ctx.scale)
            slope = -grads[0][:, None]
            if ctx.entropy:
                slope = slope - (logits - mean[:, None]) * grads[1][:, None]
            grad = logits.sub_(logsum[:, None]).exp_().mul_(slope)
            _add_at(grad, targets - start, grads[0])
            grad = grad.mul_(ctx.scale).to(hidden.dtype)
            sums[part] += product(grad, block.t(), dtype=torch.float32)
            if grad_weight is not None:
                grad_weight[start:stop] = product(grad.t(), chosen.t())
        spread = whole.new_zeros(whole.shape, dtype=torch.float32).index_copy_(0, rows, tree_sum(sums, 0))
        grad_hidden = across(spread, ctx.group, sharded=True).to(hidden.dtype)
        return grad_hidden, None, grad_weight, *([None] * 6)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: TensorGroup, scale: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of some rows, the logarithms of their sums, and their mean logits if asked for."""
    logits = product(hidden, weight, dtype=torch.float32).mul_(scale)
    top, logsum = log_total(logits, group)
    inside = (targets >= 0) & (targets < logits.shape[1])
    target = torch.zeros_like(top)
    if logits.shape[1]:
        place = targets.clamp(0, logits.shape[1] - 1)
        target = torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0.0)
    target = group.all_reduce(target)  # one rank's and zeros
    mean = logsum
    if entropy:
        below = logits - logsum[:, None]
        mean = logsum + exact_sum(torch.exp(below) * below, group)
    return target - logsum, logsum, mean


def _blocks(share: int, parts: int, rows: int, real: int) -> Iterator[tuple[int, int, int]]:
    """(part, first, last row) of blocks of the head, in parts of `share` rows; as wide on any layout."""
    wide = max(1, BLOCK // max(1, rows) // DEPTH) * DEPTH
    for part in range(parts):
        end = min((part + 1) * share, real)
        for start in range(part * share, end, wide):
            yield part, start, min(start + wide, end)


def _add_at(grad_NW: Tensor, place_N: Tensor, value_N: Tensor) -> None:
    inside = (place_N >= 0) & (place_N < grad_NW.shape[1])
    column = place_N.clamp(0, grad_NW.shape[1] - 1)[:, None]
    grad_NW.scatter_add_(1, column, torch.where(inside, value_N, 0.0)[:, None])


class Values(torch.autograd.Function):
    """float32 (T,) outputs of a value head (1, D) from hidden states (T, D)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: TensorGroup, add: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group, ctx.add = group, add
        return tree_sum(hidden.float() * weight.float(), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from puzzle.model.invariant.pointwise import replicated

        hidden, weight = ctx.saved_tensors
        grad = grads[0].float()[:, None]
        grad_weight = replicated(ctx.add(grad * hidden.float()), ctx.group)[None]
        return (grad * weight.float()).to(hidden.dtype), grad_weight.to(weight.dtype), None, None
