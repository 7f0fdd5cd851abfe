"""Sequences laid end to end: T tokens without padding, but for a dummy segment that rounds T up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def padding(lengths: Sequence[int], multiple: int) -> int:
    """Dummy tokens behind the last sequence, so that the tokens divide by `multiple`."""
    return -sum(lengths) % multiple


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. All but `tokens_T` follows from `lengths` and `multiple`, which every stage knows."""

    lengths: tuple[int, ...]
    multiple: int
    tokens_T: Tensor  # int64; the dummy segment holds zeros

    @cached_property
    def total(self) -> int:
        """T, dummy tokens included."""
        return self.tokens_T.shape[0]

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the sequences and, if there is one, of the dummy segment."""
        dummy = padding(self.lengths, self.multiple)
        return (*self.lengths, dummy) if dummy else self.lengths

    @cached_property
    def max_len(self) -> int:
        """Length of the longest segment."""
        return max(self.segments)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 (segments + 1,): where each segment starts, and T."""
        starts = torch.tensor((0, *self.segments), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return starts.to(self.tokens_T.device)

    @cached_property
    def positions_T(self) -> Tensor:
        """int64 (T,): place of each token inside its segment."""
        places = torch.cat([torch.arange(n) for n in self.segments])
        return places.to(self.tokens_T.device)

    @cached_property
    def segment_T(self) -> Tensor:
        """int64 (T,): index of each token's segment."""
        lengths = torch.tensor(self.segments)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.tokens_T.device)

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 (sequences,): row of each sequence's last token."""
        return (self.cu_seqlens[1 : len(self.lengths) + 1] - 1).long()


def pack(
    sequences: Sequence[Sequence[int] | Tensor], multiple: int = 1, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lay `sequences` (none empty) end to end and round their tokens up to a multiple of `multiple` (tp)."""
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"cannot pack sequences of lengths {lengths}")
    tokens = torch.zeros(sum(lengths) + padding(lengths, multiple), dtype=torch.int64)
    torch.cat([torch.as_tensor(s, dtype=torch.int64).cpu() for s in sequences], out=tokens[: sum(lengths)])
    return PackedBatch(lengths, multiple, tokens.to(device))
