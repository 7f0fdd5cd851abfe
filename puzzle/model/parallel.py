"""The tensor-parallel group of one stage, and the differentiable moves of tokens inside it.

Between matrices, activations are cut along tokens (sequence parallelism): a rank holds T/tp rows.
A column-parallel matrix needs all T rows (gather); a row-parallel one leaves a partial sum of all T rows
(scatter: sum and keep the own rows). The forward of one is the backward of the other.
Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.model.linear import linear, product, waits_for, weight_gradient
from puzzle.model.peer_sums import Part, PeerSums

# torch 2.13 renames the flat collectives and warns at the old names; 2.11 has the old ones alone.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TensorGroup:
    """The ranks that share every matrix of one stage. Without a process group: one rank, nothing is sent.

    `ranks` are the global ranks by tensor rank; torch's own order is always ascending, so where they are not,
    parts of gathered and scattered tensors change places. `moved` counts the bytes of the full tensors this
    rank has put through collectives. With `sums`, decode passes sum by these what they can.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ranks: Sequence[int] = ()) -> None:
        self.group, self.rank, self.size, self.moved = group, 0, 1, 0
        self.first = 0
        self.sums: PeerSums | None = None
        self._theirs: list[int] | None = None  # torch's number of every tensor rank, if these differ
        self._ours: list[int] | None = None  # the inverse
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            theirs = [dist.get_group_rank(group, rank) for rank in ranks] or list(range(self.size))
            if theirs != sorted(theirs):
                self._theirs, self._ours = theirs, [theirs.index(g) for g in range(self.size)]
                self.rank, self.first = self._ours[self.rank], theirs[0]

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can hold its collectives: NCCL's alone run on the device."""
        return self.group is None or dist.get_backend(self.group) == "nccl"

    def _ordered(self, x: Tensor, order: list[int] | None) -> Tensor:
        """The `size` equal parts of dimension 0 in another order."""
        if order is None:
            return x
        return torch.cat([x.chunk(self.size)[part] for part in order])

    def all_gather(self, x: Tensor) -> Tensor:
        """(n, ...) on every rank -> (size * n, ...) in rank order."""
        return x if self.size == 1 else self.start_all_gather(x)()

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """`all_gather` beside what comes until the result is asked for; of at least two ranks."""
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        work = all_gather_flat(out, x.contiguous(), group=self.group, async_op=True)
        self.moved += out.nbytes

        def result() -> Tensor:
            work.wait()
            return self._ordered(out, self._theirs)

        return result

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """(size * n, ...) on every rank -> the sum's own (n, ...)."""
        return x if self.size == 1 else self.start_reduce_scatter(x)()

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """`reduce_scatter` beside what comes until the result is asked for; of at least two ranks."""
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        parts = self._ordered(x, self._ours).contiguous()
        work = reduce_scatter_flat(out, parts, group=self.group, async_op=True)
        self.moved += x.nbytes

        def result() -> Tensor:
            work.wait()
            return out

        return result

    def exchange(self, x: Tensor) -> Tensor:
        """(size * n, ...) on every rank -> (size, n, ...): what each rank has of the own n, in rank order."""
        parts = self._ordered(x, self._ours).contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=self.group)
        self.moved += out.nbytes
        return self._ordered(out, self._theirs).view(self.size, -1, *x.shape[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
            self.moved += x.nbytes
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
            self.moved += x.nbytes
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Every rank receives the first rank's values, in place."""
        if self.size > 1:
            dist.broadcast(x, group_src=self.first, group=self.group)
            self.moved += x.nbytes
        return x

    def combine(self, x: Tensor, sharded: bool) -> Tensor:
        """Sum the ranks' partial (T, ...): the own T/tp rows if `sharded` along tokens, else all."""
        if self.size == 1:
            return x
        if sharded:
            return _Scatter.apply(x, self)
        if x.requires_grad:
            raise RuntimeError("activations that are whole on every rank have no backward pass")
        return self.all_reduce(x)

    def combine_later(self, x: Tensor) -> Tensor | Part:
        """`combine` of a decode pass's partial (B, D), or what is left to sum with what follows."""
        if self.sums is None or x.requires_grad or not self.sums.takes(x):
            return self.combine(x, False)
        self.moved += x.nbytes
        return Part(x, self.sums)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grads[0]), None


class _GatherOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(0, ctx.group.rank * ctx.rows, ctx.rows), None


class _GatherLinear(torch.autograd.Function):
    """Keeps the shard alone for the backward pass and gathers it again there: activations stay 1/tp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.save_for_backward(x, weight)
        return product(group.all_gather(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        # The gather travels beside one product, the scatter beside the other, unless that waits.
        grad_x = gathered = grad_weight = None
        if ctx.needs_input_grad[1]:
            deferred, x = waits_for(weight) is not None, x.detach()
            gathered = partial(ctx.group.all_gather, x) if deferred else ctx.group.start_all_gather(x)
        if ctx.needs_input_grad[0]:
            grad_x = ctx.group.start_reduce_scatter(product(grad, weight, transposed=True))
        if gathered is not None:
            grad_weight = weight_gradient(weight, grad.t(), gathered)
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return None if grad_x is None else grad_x(), grad_weight, grad_bias, None


def gather_tokens(x: Tensor, group: TensorGroup) -> Tensor:
    """(T/tp, ...) -> (T, ...). Ranks use the rows in different ways: the backward pass sums over them."""
    return x if group.size == 1 else _Gather.apply(x, group)


def gather_outputs(x: Tensor, group: TensorGroup) -> Tensor:
    """(T/tp, ...) -> (T, ...) for results that every rank puts into the same loss: backward sums nothing."""
    return x if group.size == 1 else _GatherOutputs.apply(x, group)


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup, sharded: bool
) -> Tensor:
    """The own columns of x @ weight.T + bias for all T tokens; x is (T/tp, in) if `sharded`, else (T, in)."""
    if group.size == 1 or not sharded:
        return linear(x, weight, bias)
    return _GatherLinear.apply(x, weight, bias, group)
