"""What a forward pass runs over: packed sequences, or one new token per cached sequence.

Packed sequences lie end to end: T tokens without padding, but for a dummy segment that rounds T up.
Indices are made on the host and copied to the device without waiting for it: it would run dry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
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
    past: int = 0
    """Tokens of the first sequence that are cached already: it goes on behind them."""

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
    def regular(self) -> bool:
        """Whether the tokens are rows of one length as they lie."""
        # A dummy segment can fill up short rows by chance: their sum alone says nothing.
        return self.total == sum(self.lengths) == len(self.lengths) * max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 (segments + 1,): where each segment starts, and T."""
        starts = torch.tensor((0, *self.segments), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return starts.to(self.tokens_T.device, non_blocking=True)

    @cached_property
    def positions_T(self) -> Tensor:
        """int64 (T,): position of each token in its sequence."""
        positions = torch.cat([torch.arange(n) for n in self.segments])
        positions[: self.segments[0]] += self.past
        return positions.to(self.tokens_T.device, non_blocking=True)

    @cached_property
    def row_tokens(self) -> Tensor:
        """int64 (sequences * longest,): the token at each position of left-aligned rows; 0 behind an end."""
        positions = torch.arange(max(self.lengths))
        lengths = torch.tensor(self.lengths)[:, None]
        tokens = torch.where(positions < lengths, lengths.cumsum(0) - lengths + positions, 0)
        return tokens.flatten().to(self.tokens_T.device, non_blocking=True)

    @cached_property
    def token_rows(self) -> Tensor:
        """int64 (T,): where each token stands in left-aligned rows; 0 for the dummy segment's tokens."""
        starts = torch.arange(len(self.lengths)) * max(self.lengths)
        rows = torch.repeat_interleave(starts, torch.tensor(self.lengths))
        rows += torch.cat([torch.arange(n) for n in self.lengths])
        return F.pad(rows, (0, self.total - len(rows))).to(self.tokens_T.device, non_blocking=True)

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 (sequences,): row of each sequence's last token."""
        return (self.cu_seqlens[1 : len(self.lengths) + 1] - 1).long()


@dataclass(frozen=True)
class DecodeBatch:
    """One new token for each of B rows of a cache; the longest row reaches to `reach` with it."""

    tokens_T: Tensor
    positions_T: Tensor
    reach: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def mask(self, window: int | None) -> Tensor:
        """bool (B, 1, 1, reach): cached positions that a row's new token sees, the last `window` if given."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> Tensor:
        position = torch.arange(self.reach, device=self.positions_T.device)
        last = self.positions_T[:, None]
        seen = position <= last
        if window is not None:
            seen &= position > last - window
        return seen[:, None, None]


def pack(
    sequences: Sequence[Sequence[int] | Tensor],
    multiple: int = 1,
    device: torch.device | str = "cpu",
    past: int = 0,
) -> PackedBatch:
    """Lay `sequences` (none empty) end to end and round their tokens up to a multiple of `multiple` (tp);
    `past` tokens of the first one are cached already."""
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"cannot pack sequences of lengths {lengths}")
    tokens = torch.zeros(sum(lengths) + padding(lengths, multiple), dtype=torch.int64)
    torch.cat([torch.as_tensor(s, dtype=torch.int64).cpu() for s in sequences], out=tokens[: sum(lengths)])
    return PackedBatch(lengths, multiple, tokens.to(device, non_blocking=True), past)
