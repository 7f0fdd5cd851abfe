"""The norm of all gradients of a model, over all its ranks, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.model.pointwise import has_kernels

Finish = Callable[[], Tensor]
"""Gives the sum of squares, float32, 0-d; waits for the other ranks."""

LIMB = 25
"""Bits of a limb: 2^37 squares of limbs fit into an int64."""

LOWER = (1 << LIMB) - 1
"""A number's low limb."""

PIECE = 1 << 24
"""Gradients that plain torch squares at once."""


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
    vectors = _joined(parts)
    tops = torch._foreach_norm(vectors, torch.inf) if vectors else []
    top = torch.stack(tops).amax() if tops else torch.zeros((), device=device)
    top = torch.where(top.isfinite(), top, torch.inf)
    work = None if group is None else dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def finish() -> Tensor:
        # In double: float32 powers of two end at 2^127, squares of float32 gradients do not.
        exponent = torch.frexp(top.double()).exponent.double()
        limbs = _limbs(vectors, torch.ldexp(torch.ones_like(exponent), -exponent))
        if group is not None:
            dist.all_reduce(limbs, group=group)
        high, low = limbs.unbind()
        # What the low limb has too much depends on who added it; the sum of both does not.
        high, low = (high + (low >> LIMB)).double(), (low & LOWER).double()
        total = torch.ldexp(high * 2.0**-LIMB + low * 2.0 ** (-2 * LIMB), 2 * exponent)
        return torch.where(top.isfinite(), total, torch.inf).float()

    return work, finish


def _joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of all that is in `parts`; what lies one behind the other is one of them."""
    found: list[Tensor] = []
    for part in parts:
        vector, last = part.reshape(-1), found[-1] if found else None
        if not vector.numel():
            continue
        behind = (
            last is not None
            and last.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == vector.storage_offset()
        )
        if last is not None and behind:
            found[-1] = last.as_strided((last.numel() + vector.numel(),), (1,))
        else:
            found.append(vector)
    return found


def _limbs(vectors: Sequence[Tensor], scale: Tensor) -> Tensor:
    """int64 (2,): multiples of 2^-25 and 2^-50 that the squares of gradients times `scale` make."""
    limbs = torch.zeros(2, dtype=torch.int64, device=scale.device)
    if has_kernels(scale.device):
        from puzzle.model.kernels import invariant_sums

        for vector in vectors:
            invariant_sums.squares(vector, scale, limbs, LIMB)
        return limbs
    for vector in vectors:
        for piece in vector.split(PIECE):
            units = (piece.double() * scale).square_().mul_(2.0 ** (2 * LIMB)).add_(0.5).long()
            limbs += torch.stack(((units >> LIMB).sum(), (units & LOWER).sum()))
    return limbs
