"""The norm of all gradients of a model, over all its ranks, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], Tensor]
"""Gives the sum of squares, float32, 0-d; waits for the other ranks."""

LIMB = 25
"""Bits of a limb: 2^37 squares of limbs fit into an int64."""

PIECE = 1 << 24
"""Gradients that are squared at once."""


def start(
    parts: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[dist.Work | None, Finish]:
    """Each rank's squares, added up in whatever order is quick."""
    norms = torch.stack(torch._foreach_norm(list(parts))) if parts else torch.zeros(1, device=device)
    square = norms.square().sum()
    work = None if group is None else dist.all_reduce(square, group=group, async_op=True)
    return work, lambda: square


def start_exact(
    parts: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[dist.Work | None, Finish]:
    """The same bits however the gradients are cut: squares are added as integers, of two limbs.

    The largest gradient says what an integer is worth: 2^-50 of its square, rounded up to a power of two. An
    infinite sum says that a gradient was not finite.
    """
    tops = [part.abs().amax() for part in parts if part.numel()]
    top = torch.stack(tops).amax() if tops else torch.zeros((), device=device)
    top = torch.where(top.isfinite(), top, torch.inf)
    work = None if group is None else dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def finish() -> Tensor:
        # In double: float32 powers of two end at 2^127, squares of float32 gradients do not.
        exponent = torch.frexp(top.double()).exponent.double()
        limbs = torch.zeros(2, dtype=torch.int64, device=device)
        for part in parts:
            for piece in part.reshape(-1).split(PIECE):
                square = torch.ldexp(piece.double(), -exponent).square_()
                for limb in range(2):
                    square.mul_(2.0**LIMB)
                    whole = square.round() if limb else square.floor()
                    limbs[limb] += whole.nan_to_num_(0.0, 0.0, 0.0).long().sum()
                    square.sub_(whole)
        if group is not None:
            dist.all_reduce(limbs, group=group)
        high, low = limbs.double().unbind()
        total = torch.ldexp(high * 2.0**-LIMB + low * 2.0 ** (-2 * LIMB), 2 * exponent)
        return torch.where(top.isfinite(), total, torch.inf).float()

    return work, finish
