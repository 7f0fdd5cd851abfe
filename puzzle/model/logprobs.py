"""Log-probabilities, entropies and logits of a head whose vocabulary rows are cut over the tensor group.

A full (N, V/tp) matrix of fp32 logits is never made: the vocabulary is walked in blocks of at most
`BLOCK` logits, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018); the backward
pass computes each block again. Blocks run along the vocabulary, not along tokens, so that the rows of the
head's gradient are complete after one product each. Suffixes: N chosen tokens, D hidden, V vocabulary
rows here, W rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puzzle.model.linear import linear, product
from puzzle.model.parallel import TensorGroup

BLOCK = 1 << 24
"""Most fp32 logits alive at once in one tensor: 64 MiB."""


class TokenStats(NamedTuple):
    """float32 (N,): log-probability of each target, and entropy of its distribution if asked for."""

    logprobs: Tensor
    entropy: Tensor | None


def project(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 logits (N, V).

    Half-precision products are accumulated and kept in fp32 where the device can.
    """
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float32:
        return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)
    return linear(hidden_ND, weight_VD).float()


def token_stats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    group: TensorGroup,
    rows: int,
    temperature: float = 1.0,
    entropy: bool = False,
    block: int = BLOCK,
) -> TokenStats:
    """log_softmax(logits / temperature) at the targets, equal on every rank of the group.

    `weight_VD` are this rank's vocabulary rows, the first of them `group.rank * V`; those from global row
    `rows` on are padding and count as absent. The gradients of `hidden_ND` and `weight_VD` are this
    rank's partial sums.
    """
    offset = group.rank * weight_VD.shape[0]
    real = max(0, min(weight_VD.shape[0], rows - offset))
    logprobs, entropies = _TokenStats.apply(
        hidden_ND, weight_VD, targets_N - offset, group, real, 1.0 / temperature, entropy, block
    )
    return TokenStats(logprobs, entropies if entropy else None)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: TensorGroup,
        real: int,
        scale: float,
        entropy: bool,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        sums = _online_sums(hidden, weight, targets, real, scale, entropy, block)
        peak = group.all_reduce_max(sums[0].clone())
        # A rank without real rows has a peak of -inf and sums of zero.
        sums[1:3] *= torch.exp(sums[0] - peak)
        total, moment, target = group.all_reduce(sums[1:]).unbind()
        logsum = peak + total.log()
        mean = moment / total
        ctx.save_for_backward(hidden, weight, targets, logsum, mean)
        ctx.real, ctx.scale, ctx.entropy, ctx.block = real, scale, entropy, block
        return target - logsum, logsum - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logsum, mean = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start, logits in _blocks(hidden, weight, ctx.real, ctx.scale, ctx.block):
            stop = start + logits.shape[1]
            centred = logits - mean[:, None] if ctx.entropy else None
            p = logits.sub_(logsum[:, None]).exp_()
            slope = -grad_logprobs[:, None]
            if centred is not None:
                # dH/dl = -p (l - sum p l); `centred` holds l - sum p l.
                slope = slope - centred.mul_(grad_entropy[:, None])
            grad_logits = p.mul_(slope)
            _add_at_targets(grad_logits, targets - start, grad_logprobs)
            grad_logits = grad_logits.mul_(ctx.scale).to(hidden.dtype)
            grad_hidden += product(grad_logits, weight[start:stop], transposed=True)
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[start:stop])
        return grad_hidden.to(hidden.dtype), grad_weight, *([None] * 6)


def _blocks(
    hidden: Tensor, weight: Tensor, real: int, scale: float, block: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 logits (N, W) times `scale`) of each block of the rank's real vocabulary rows."""
    width = max(1, block // max(1, hidden.shape[0]))
    for start in range(0, real, width):
        yield start, project(hidden, weight[start : min(start + width, real)]).mul_(scale)


def _online_sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, real: int, scale: float, entropy: bool, block: int
) -> Tensor:
    """fp32 (4, N): maximum m, sum of exp(l - m), sum of l exp(l - m), logit of the target if it is here."""
    sums = torch.zeros((4, hidden.shape[0]), dtype=torch.float32, device=hidden.device)
    peak, total, moment, target = sums.unbind()
    peak.fill_(-torch.inf)
    for start, logits in _blocks(hidden, weight, real, scale, block):
        inside = (targets >= start) & (targets < start + logits.shape[1])
        place = (targets - start).clamp(0, logits.shape[1] - 1)
        target += torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0.0)
        higher = torch.maximum(peak, logits.amax(1))
        shrink = torch.exp(peak - higher)
        weights = torch.exp(logits - higher[:, None])
        total.mul_(shrink).add_(weights.sum(1))
        if entropy:
            moment.mul_(shrink).add_(weights.mul_(logits).sum(1))
        peak.copy_(higher)
    return sums


def _add_at_targets(grad_NW: Tensor, place_N: Tensor, value_N: Tensor) -> None:
    """Add `value_N` at column `place_N` of each row whose place lies in the block."""
    inside = (place_N >= 0) & (place_N < grad_NW.shape[1])
    column = place_N.clamp(0, grad_NW.shape[1] - 1)[:, None]
    grad_NW.scatter_add_(1, column, torch.where(inside, value_N, 0.0)[:, None])
