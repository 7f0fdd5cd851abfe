"""Causal attention over packed sequences and over a key/value cache.

No mask ever spans sequences: on CUDA the varlen flash kernel reads the packed tokens as they are; elsewhere
they are laid out as (B, S) rows, left-aligned, where causality alone hides the padding behind a sequence.
Suffixes: T packed tokens, B rows, S positions of a row, H query heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model.packing import DecodeBatch, PackedBatch

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN: Callable[..., Any] | None = varlen_attn
    _VARLEN_KEYS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    _VARLEN, _VARLEN_KEYS = None, frozenset()


class Slots(NamedTuple):
    """Where the first n keys and values of a pass go: a layer's (B, K, S, h); int64 rows, positions (n,)."""

    k_BKSh: Tensor
    v_BKSh: Tensor
    rows: Tensor
    positions: Tensor

    def write(self, k_TKh: Tensor, v_TKh: Tensor) -> None:
        """Store them."""
        count = len(self.rows)
        self.k_BKSh[self.rows, :, self.positions[:count]] = k_TKh[:count]
        self.v_BKSh[self.rows, :, self.positions[:count]] = v_TKh[:count]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one stage, (layers, B, K, S, h) each; row b holds one sequence, left-aligned.

    Sequence i of a batch is row i, or row `order[i]` (int64) if there is an order.
    """

    k: Tensor
    v: Tensor
    order: Tensor | None = None

    def rows(self, start: int, stop: int) -> KVCache:
        """The same memory, rows [start, stop) alone."""
        return KVCache(self.k[:, start:stop], self.v[:, start:stop])

    def pick(self, rows: Sequence[int]) -> KVCache:
        """The same memory for a batch whose sequence i is row `rows[i]`."""
        start = rows[0]
        if list(rows) == list(range(start, start + len(rows))):
            return self.rows(start, start + len(rows))
        return KVCache(self.k, self.v, torch.tensor(rows).to(self.k.device, non_blocking=True))

    def slots(self, layer: int, rows_T: Tensor, batch: PackedBatch | DecodeBatch) -> Slots:
        """Where a layer's keys and values of a batch go; a dummy segment is left out."""
        return Slots(self.k[layer], self.v[layer], rows_T, batch.positions_T)

    def rows_of(self, batch: PackedBatch | DecodeBatch) -> Tensor:
        """int64: the row of each token of the batch."""
        return batch.rows_T if self.order is None else self.order[batch.rows_T]

    def read(self, layer: int, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, reach, h) of the rows of `batch`."""
        rows = len(batch.tokens_T)
        return self.k[layer, :rows, :, : batch.reach], self.v[layer, :rows, :, : batch.reach]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`, in every layer."""
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]


def packed_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None
) -> Tensor:
    """Causal attention inside each segment, over the last `window` tokens if given. Returns (T, H, h)."""
    if window is not None and window >= batch.max_len:
        window = None
    half = q_THh.dtype in (torch.bfloat16, torch.float16)
    if _VARLEN is not None and q_THh.is_cuda and half:
        return _varlen_attention(_VARLEN, q_THh, k_TKh, v_TKh, batch, window)
    return _row_attention(q_THh, k_TKh, v_TKh, batch, window)


def decode_attention(q_BHh: Tensor, k_BKSh: Tensor, v_BKSh: Tensor, mask: Tensor) -> Tensor:
    """One query per row against the row's cached tokens, its own included. Returns (B, H, h)."""
    rows, groups = k_BKSh.shape[:2]
    # The query heads of a kv head stand as its queries: no key is copied, and no mask is different.
    grouped = q_BHh.reshape(rows, groups, -1, q_BHh.shape[-1])
    return F.scaled_dot_product_attention(grouped, k_BKSh, v_BKSh, attn_mask=mask).reshape(q_BHh.shape)


def _varlen_attention(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None
) -> Tensor:
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _VARLEN_KEYS else {}
    if "window_size" in _VARLEN_KEYS:
        # The kernel counts the tokens to the left of the query, we count the query too.
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    starts, longest = batch.cu_seqlens, batch.max_len
    return kernel(q, k, v, starts, starts, longest, longest, **options)


def _row_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None) -> Tensor:
    rows, longest = len(batch.lengths), max(batch.lengths)
    # A dummy segment can fill up short rows by chance: their sum alone says nothing.
    regular = batch.total == sum(batch.lengths) == rows * longest
    if not regular:
        q, k, v = (x.index_select(0, batch.row_tokens) for x in (q, k, v))
    mask = None
    if window is not None:
        position = torch.arange(longest, device=q.device)
        mask = (position[None] <= position[:, None]) & (position[None] > position[:, None] - window)
    q, k, v = (x.view(rows, longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    out = out.transpose(1, 2).reshape(rows * longest, *out.shape[1:2], out.shape[3])
    return out if regular else out.index_select(0, batch.token_rows)
