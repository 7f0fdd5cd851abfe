"""Causal attention over packed sequences and over a key/value cache.

No mask ever spans sequences: on CUDA a flash kernel reads the packed tokens as they are; elsewhere
they are laid out as (B, S) rows, left-aligned, where causality alone hides the padding behind a sequence.
Suffixes: T packed tokens, B rows, S positions of a row, H query heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from puzzle.model.packing import PackedBatch

COPIED = 1 << 26
"""Most bytes of pages that lie in memory twice while they are copied."""


MEMBERS = 8
"""Most rows of a family: their queries go through the matrix units together."""


class Families(NamedTuple):
    """Rows of a decode pass that begin with the same pages (samples of one prompt), whose keys and values a
    kernel reads once for all of them.

    `members_FM` (int32, F x 1 + MEMBERS): how many positions these pages have (0: no family), then the rows,
    in front, -1 for none. `shared_B` (int32): those positions by row, 0 where it is in no family.
    """

    members_FM: Tensor
    shared_B: Tensor


class Slots(NamedTuple):
    """A layer's keys and values, (K, pages, page, h) each, as a pass uses them.

    `places` (int64, n): where those of its first n tokens go, counted through all pages; `past` (int64):
    where those lie that its first sequence has cached already. `table` (int32, B x most pages of a row): for
    a decode pass, the pages of its rows in the order of their positions. `lying` are the rows' pages where
    each has a single one and these lie at equal distances. Kernels read what `families` share once.
    """

    k_KPSh: Tensor
    v_KPSh: Tensor
    places: Tensor
    table_BP: Tensor | None = None
    lying: slice | None = None
    past: Tensor | None = None
    families: Families | None = None

    def before(self, k_TKh: Tensor, v_TKh: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a packed pass behind those cached at `past`, of which its first sequence is the
        continuation."""
        if self.past is None:
            return k_TKh, v_TKh
        return _behind(self.k_KPSh, self.past, k_TKh), _behind(self.v_KPSh, self.past, v_TKh)

    def write(self, k_TKh: Tensor, v_TKh: Tensor) -> None:
        """Store them; a dummy segment behind the first n tokens is left out."""
        count = len(self.places)
        self.k_KPSh.flatten(1, 2)[:, self.places] = k_TKh[:count].transpose(0, 1)
        self.v_KPSh.flatten(1, 2)[:, self.places] = v_TKh[:count].transpose(0, 1)

    def read(self, reach: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, reach, h) of the first `reach` positions of every row."""
        if self.lying is not None:
            held = (self.k_KPSh[:, self.lying, :reach], self.v_KPSh[:, self.lying, :reach])
            return held[0].transpose(0, 1), held[1].transpose(0, 1)
        assert self.table_BP is not None
        if self.table_BP.shape[1] == 1:
            return self._rows(self.k_KPSh[:, :, :reach], self.table_BP), self._rows(
                self.v_KPSh[:, :, :reach], self.table_BP
            )
        pages = self.table_BP[:, : -(-reach // self.k_KPSh.shape[2])]
        return self._rows(self.k_KPSh, pages)[:, :, :reach], self._rows(self.v_KPSh, pages)[:, :, :reach]

    @staticmethod
    def _rows(x_KPSh: Tensor, pages: Tensor) -> Tensor:
        held = x_KPSh.index_select(1, pages.flatten())
        return held.view(x_KPSh.shape[0], len(pages), -1, x_KPSh.shape[3]).transpose(0, 1)


def _behind(x_KPSh: Tensor, past: Tensor, x_TKh: Tensor) -> Tensor:
    """(P + T, K, h), made once: what is cached may be long."""
    whole = x_TKh.new_empty((len(past) + len(x_TKh), *x_TKh.shape[1:]))
    torch.index_select(x_KPSh.flatten(1, 2).transpose(0, 1), 0, past, out=whole[: len(past)])
    whole[len(past) :] = x_TKh
    return whole


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one stage in pages: (layers, K, pages, page, h) each.

    The positions of a sequence lie in the pages that its row of a block table names (PagedAttention, Kwon
    et al. 2023): memory follows the tokens that exist, and sequences that begin alike share pages. `places`
    and `table` are those of a pass (`at`).
    """

    k: Tensor
    v: Tensor
    places: Tensor | None = None
    table: Tensor | None = None
    lying: slice | None = field(default=None, kw_only=True)
    past: Tensor | None = field(default=None, kw_only=True)
    families: Families | None = field(default=None, kw_only=True)

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.k.shape[3]

    def at(
        self,
        places: Tensor,
        table: Tensor | None = None,
        past: Tensor | None = None,
        families: Families | None = None,
    ) -> KVCache:
        """The same memory for a pass; `places`, `table`, `past` and `families` as in `Slots`."""
        lying = None
        if table is not None and table.device.type == "cpu" and table.shape[1] == 1:
            lying = _evenly(table[:, 0].tolist())
        return KVCache(self.k, self.v, places, table, lying=lying, past=past, families=families)

    def slots(self, layer: int) -> Slots:
        """What a layer of the pass uses."""
        assert self.places is not None
        memory = self.k[layer], self.v[layer]
        return Slots(*memory, self.places, self.table, self.lying, self.past, self.families)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy pages `sources` over pages `targets` (int64 each), in every layer, some at a time."""
        some = max(1, COPIED // self.k[0, :, 0].nbytes)
        for memory in (*self.k, *self.v):
            for source, target in zip(sources.split(some), targets.split(some), strict=True):
                memory[:, target] = memory[:, source]


def _evenly(numbers: list[int]) -> slice | None:
    """The slice of these numbers, if they grow evenly."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step < 1 or numbers != list(range(numbers[0], numbers[0] + step * len(numbers), step)):
        return None
    return slice(numbers[0], numbers[-1] + 1, step)


def packed_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None
) -> Tensor:
    """Causal attention inside each segment, over the last `window` tokens if given. Returns (T, H, h).

    In front of the keys and values are those of the `batch.past` tokens before the first segment.
    """
    if window is not None and window >= batch.max_len + batch.past:
        window = None
    if _flash_takes(q_THh) and (found := flash()) is not None:
        return _flash_attention(found, q_THh, k_TKh, v_TKh, batch, window)
    past, first = batch.past, batch.segments[0]
    out = _row_attention(q_THh, k_TKh[past:], v_TKh[past:], batch, window)
    if past:
        ends = (past + first, first)
        out = out.index_copy(
            0, torch.arange(first, device=out.device), _goes_on(q_THh, k_TKh, v_TKh, ends, window)
        )
    return out


def decode_attention(q_BHh: Tensor, k_BKSh: Tensor, v_BKSh: Tensor, mask: Tensor) -> Tensor:
    """One query per row against the row's cached tokens, its own included. Returns (B, H, h)."""
    rows, groups = k_BKSh.shape[:2]
    # The query heads of a kv head stand as its queries: no key is copied, and no mask is different.
    grouped = q_BHh.reshape(rows, groups, -1, q_BHh.shape[-1])
    return F.scaled_dot_product_attention(grouped, k_BKSh, v_BKSh, attn_mask=mask).reshape(q_BHh.shape)


@cache
def flash() -> OpOverload | None:
    """torch's flash attention over packed sequences (Dao 2023), None in a version without its windows.

    The operator itself: `torch.nn.attention.varlen` wraps it in one of Python, whose first call imports
    torch's compiler, for 1 s of a run's first iteration (docs/performance.md).
    """
    packet = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if packet is None:
        return None
    names = {one.name for one in packet.default._schema.arguments}
    return packet.default if {"window_size_left", "window_size_right"} <= names else None


def _flash_takes(q_THh: Tensor) -> bool:
    """Whether the kernel has such heads: it loads 8 of their numbers at a time, 256 at most."""
    half, width = q_THh.dtype in (torch.bfloat16, torch.float16), q_THh.shape[-1]
    return q_THh.is_cuda and half and width % 8 == 0 and width <= 256


def _flash_attention(
    operator: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None
) -> Tensor:
    starts, longest, past = batch.cu_seqlens, batch.max_len, batch.past
    key_starts, keys = starts, longest
    if past:
        # The kernel lets the last query of a segment see its last key, whatever their numbers.
        key_starts, keys = starts + past, max(longest, batch.segments[0] + past)
        key_starts[0] = 0
    # No dropout, causal unless the windows say so, no mask to debug. A window has the tokens to the left of
    # the query; ours counts the query too.
    given = (q, k, v, starts, key_starts, longest, keys, 0.0, window is None, False)
    left = -1 if window is None else window - 1
    return operator(*given, window_size_left=left, window_size_right=0)[0]


def _goes_on(q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, int], window: int | None) -> Tensor:
    """(n, H, h) for the first n of q against the first m of k and v; `ends` are m and n. Their ends meet."""
    keys, count = ends
    place = torch.arange(keys, device=q.device)
    query = place[keys - count :, None]
    mask = place <= query
    if window is not None:
        mask &= place > query - window
    q, k, v = (x.transpose(0, 1)[None] for x in (q[:count], k[:keys], v[:keys]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _row_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, window: int | None) -> Tensor:
    rows, longest = len(batch.lengths), max(batch.lengths)
    q, k, v = (to_rows(x, batch).transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None:
        position = torch.arange(longest, device=q.device)
        mask = (position[None] <= position[:, None]) & (position[None] > position[:, None] - window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    out = out.transpose(1, 2).reshape(rows * longest, *out.shape[1:2], out.shape[3])
    return out if batch.regular else out.index_select(0, batch.token_rows)


def to_rows(x: Tensor, batch: PackedBatch) -> Tensor:
    """(T, ...) -> (B, S, ...): left-aligned rows; what lies behind the end of a sequence is any token's."""
    if not batch.regular:
        x = x.index_select(0, batch.row_tokens)
    return x.view(len(batch.lengths), max(batch.lengths), *x.shape[1:])
