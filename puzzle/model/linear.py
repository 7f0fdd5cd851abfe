"""Matrix products whose weight gradients may be added straight to a float32 sum, without a tensor between.

A bf16 gradient that is written, read and added moves 10 bytes per parameter and micro-batch beside the
product; added by the product itself, 8, and those while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.model.pointwise import has_kernels

FEW = 64
"""Rows up to which `skinny_gemm` reads weights faster than the BLAS (measured on an H100 and an H200)."""

NORMED = torch.bfloat16
"""Whose hidden states products norm: in float16 a state times a norm's weight may be too large."""

FEW_ON_CPU = 16
"""Rows up to which a CPU multiplies wide matrices from the left."""

Accumulate = Callable[[Tensor, Tensor, Tensor, bool], None]
"""(total, left, right, first): total (float32) += left @ right, or = if it is the first."""

Sink = Callable[[Tensor, Tensor], None]
"""Takes a weight gradient as the two matrices (in the shape of the weight) whose product it is."""

# What torch.compile makes of F.linear on x86. Eager, that calls the BLAS, which needs up to twice oneDNN's
# time for the few rows of a decode pass.
_ONEDNN: Callable[..., Tensor] | None = None
if torch.backends.mkldnn.is_available():
    _ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total (float32) += left @ right, or = if it is the `first`."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif left.is_cuda and sums_in_place(left.device):
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


@cache
def sums_in_place(device: torch.device) -> bool:
    """Whether torch adds a bf16 product to a float32 matrix by itself, and rightly: versions differ."""
    left = torch.arange(16.0, device=device).to(torch.bfloat16).repeat(8, 1).t()[4:12]
    right = torch.arange(24.0, device=device).to(torch.bfloat16).repeat(8, 1)
    total = torch.full((8, 24), torch.nan, device=device)
    try:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return torch.equal(total, 2 * (left.float() @ right.float()))


class Later:
    """Lets what sinks take wait until it is asked for: backward passes then leave weights' gradients out."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] | None = None

    @contextmanager
    def deferring(self) -> Generator[list[Callable[[], None]]]:
        """What backward passes inside would have given to sinks; every call of the list gives one."""
        self.waiting = []
        try:
            yield self.waiting
        finally:
            self.waiting = None


class Weight(nn.Parameter):
    """A matrix; with a `sink`, its gradients from products go there, as `later` says, and `grad` stays
    None. `accumulate` adds such a product to a sum."""

    sink: Sink | None = None
    later: Later | None = None
    accumulate: Accumulate = staticmethod(accumulate)


def send_gradients(
    param: nn.Parameter,
    take: Callable[[nn.Parameter], None],
    take_product: Callable[[nn.Parameter, Tensor, Tensor], None],
) -> None:
    """From now on two methods of an object get a parameter's gradients, which does not keep the object.

    `take` finds a whole gradient in `param.grad`, or None if that of the last pass went to `take_product`, as
    the two matrices whose product it is. Without the object, passes end in a ReferenceError.
    """
    # Hooks lie where Python's collector sees no cycle: by them, weights, masters and moments would never go.
    param.register_post_accumulate_grad_hook(_weakly(take))
    if isinstance(param, Weight):
        param.sink = partial(_weakly(take_product), param)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    held = WeakMethod(method)

    def call(*given: Any) -> None:
        found = held()
        if found is None:
            raise ReferenceError("what gradients are added up by is gone")
        found(*given)

    return call


@dataclass(frozen=True)
class Stream:
    """Hidden states on their way through a norm, whose half the product before it has done (`Owed`).

    `total` (M, D) and `weighted` (M, D), the total times the norm's weight; `squares`, float32: sums of the
    total's squares, each of some columns, for all rows. The product behind the norm divides its rows.
    """

    total: Tensor
    weighted: Tensor
    squares: Tensor
    eps: float

    def product(self, weight: Tensor) -> Tensor:
        """The norm @ weight.T."""
        from puzzle.model.kernels import skinny_gemm

        return skinny_gemm.product(self, weight, False)

    def gates(self, weight: Tensor, blocks: int) -> Tensor:
        """`gates` of the norm."""
        from puzzle.model.kernels import skinny_gemm

        return skinny_gemm.gates(self, weight, blocks)


@dataclass(frozen=True)
class Owed:
    """x @ weight, the weight stored (in, out), that is multiplied where it is known what follows."""

    x: Tensor
    weight: Tensor

    def add_norm(self, before: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Stream]:
        """before + the product, and that on its way through a norm."""
        from puzzle.model.kernels import skinny_gemm

        stream = skinny_gemm.add(self.x, self.weight, before, norm, eps)
        return stream.total, stream

    def add_to(self, before: Tensor) -> Tensor:
        """before + the product."""
        return before + self.value()

    def value(self) -> Tensor:
        """The product."""
        return product(self.x, self.weight, transposed=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """x @ weight.T + bias, or x @ weight if the weight is stored `transposed` (in, out)."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias, transposed)
    out = _Linear.apply(x, weight, transposed)
    return out if bias is None else out + bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """What `linear` gives, where no gradient is wanted."""
    if bias is None and _few(x):
        from puzzle.model.kernels import skinny_gemm

        if skinny_gemm.fits(weight, transposed):
            return skinny_gemm.product(x, weight, transposed)
    matrix = weight.t() if transposed else weight
    if _ONEDNN is not None and x.device.type == "cpu" and x.dtype == torch.float32 and weight.numel():
        if few_and_wide(x, matrix) and bias is None:
            return _ONEDNN(matrix, x, None, "none", [], "").t().contiguous()
        return _ONEDNN(x, matrix, bias, "none", [], "")
    return F.linear(x, matrix, bias)


def gates(x: Tensor, weight: Tensor, blocks: int) -> Tensor | None:
    """silu(gate) * up of x @ weight.T as `pointwise.gated` gives it, (rows, F), where one kernel does both.

    None where none does, or gradients are wanted.
    """
    if torch.is_grad_enabled() or not _few(x):
        return None
    from puzzle.model.kernels import skinny_gemm

    return skinny_gemm.gates(x, weight, blocks) if skinny_gemm.fits(weight, False) else None


def _few(x: Tensor) -> bool:
    """Whether `skinny_gemm` multiplies rows such as these faster than the BLAS."""
    few = x.dim() == 2 and len(x) <= FEW and x.dtype in (torch.bfloat16, torch.float16)
    return few and has_kernels(x.device)


def norms(rows: int, columns: Sequence[Tensor], inward: Sequence[Tensor]) -> bool:
    """Whether the products of a layer can norm its hidden states, so many rows, between them.

    Its matrices: `columns`, which states are multiplied by behind a norm; `inward`, stored (in, out), whose
    products are added to states.
    """
    one = columns[0]
    if torch.is_grad_enabled() or rows > FEW or one.dtype != NORMED or not has_kernels(one.device):
        return False
    from puzzle.model.kernels import skinny_gemm

    fit = all(skinny_gemm.fits(weight, False) for weight in columns)
    return fit and all(skinny_gemm.fits(weight, True) for weight in inward)


def few_and_wide(x: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN, which packs its second factor at every call, had better have the few rows there.

    On two cores (AVX-512), 8 rows: 3 of 18 ms for the gates of 30 layers, nothing for squarer matrices.
    """
    wide = matrix.shape[0] >= 4 * matrix.shape[1] and matrix.is_contiguous()
    return wide and x.dim() == 2 and len(x) <= FEW_ON_CPU


def weight_gradient(weight: Tensor, left: Tensor, right: Callable[[], Tensor]) -> Tensor | None:
    """left @ right() for autograd, or None where the weight's sink takes it, now or later."""
    sink = getattr(weight, "sink", None)
    if sink is None:
        return left @ right()
    if (waiting := waits_for(weight)) is None:
        sink(left, right())
    else:
        waiting.append(lambda: sink(left, right()))
    return None


def waits_for(weight: Tensor) -> list[Callable[[], None]] | None:
    """Where the weight's gradients wait, None where they do not."""
    later = getattr(weight, "later", None)
    return None if later is None or getattr(weight, "sink", None) is None else later.waiting


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return product(x, weight, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight, transposed=not ctx.transposed)
        if ctx.needs_input_grad[1]:
            x = x.detach()  # waiting, it must not keep the graph
            left, right = (x.t(), grad) if ctx.transposed else (grad.t(), x)
            grad_weight = weight_gradient(weight, left, lambda: right)
        return grad_x, grad_weight, None
