"""Sums over the tensor ranks of a decode pass, each made by one kernel that reads its peers' memory.

A row-parallel product leaves a `Part` of a sum on every rank. Where collectives would make the sum, then a
kernel add the residual and norm it, `PeerSums` does all three at once (`kernels.peer_sum`). The parts are
added in float32 in the order of ranks, so all ranks have the same bits; the sum is rounded before the
residual is added, as that of a collective is. So two ranks have the collective's own bits; more than two add
in float32 what a collective may add in another order and round between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_READ = 2 << 20
"""Bytes that a rank may read of its peers in one sum. A rank reads the whole of every peer's part, where a
ring or tree of a collective moves less than two; where that begins to matter is not measured."""

MOST_PROGRAMS = 128
"""Programs of a kernel, on devices that have as many multiprocessors."""


def most_rows(size: int, width: int, itemsize: int) -> int:
    """Rows of a pass up to which sums of `size` ranks read peers' memory."""
    return MOST_READ // ((size - 1) * width * itemsize)


class PeerSums:
    """What sums of one decoder's passes need: buffers of all tensor ranks, mapped here, and counts.

    All tensor ranks make the same calls in the same order. A rank's buffers and counts are written by its
    kernels, counts by its peers' as well.
    """

    def __init__(self, rank: int, buffers: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        """`buffers` (2, rows, D) and `counts` int64 (programs,), zeros, of all tensor ranks by rank."""
        own = buffers[rank]
        self.rank, self.size, self.dtype = rank, len(buffers), own.dtype
        _, self.rows, self.width = own.shape
        self._mapped = (tuple(buffers), tuple(counts))  # as long as this lives
        places = [[x.data_ptr() for x in tensors] for tensors in self._mapped]
        self._addresses = torch.tensor(places, dtype=torch.int64).to(own.device)
        self._calls = torch.zeros_like(counts[rank])

    def takes(self, part: Tensor) -> bool:
        """Whether parts (B, D) such as this one can be added here."""
        fits = part.dim() == 2 and 0 < len(part) <= self.rows and part.shape[1] == self.width
        return fits and part.dtype == self.dtype

    def add_norm(self, x: Tensor, part: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + the sum of all ranks' `part`, and its root-mean-square norm; (B, D) each."""
        return self._launched(x, part, weight, eps)

    def add(self, x: Tensor, part: Tensor) -> Tensor:
        """x + the sum of all ranks' `part`, (B, D)."""
        return self._launched(x, part, None, 0.0)[0]

    def _launched(self, x: Tensor, part: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        from puzzle.model.kernels import peer_sum

        x, part = x.contiguous(), part.contiguous()
        total = torch.empty_like(x)
        normed = total if weight is None else torch.empty_like(x)
        told = (self._addresses, self._calls, self.rank, self.rows, eps)
        peer_sum.launch(x, part, weight, total, normed, *told)
        return total, normed


class Part(NamedTuple):
    """What a rank has of a sum over tensor ranks, (B, D), which is made where it is added to something."""

    own: Tensor
    sums: PeerSums

    def add_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + the sum, and its root-mean-square norm."""
        return self.sums.add_norm(x, self.own, weight, eps)

    def add_to(self, x: Tensor) -> Tensor:
        """x + the sum."""
        return self.sums.add(x, self.own)
