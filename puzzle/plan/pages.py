"""The key/value cache in pages: how many sequences need, and what they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.plan.layout import Layout
from puzzle.spec.model import ModelSpec

PREFILL_TOKENS = 8192
"""Most tokens of a prefill pass; longer sequences are cached in parts."""
PAGE = 128
"""Positions of a page of the key/value cache on CUDA: as many as decode kernels read at a time, at most. On a
CPU a sequence has one page, so that rows are read where they lie."""
KEPT_FREE = 0.02
"""Share of a device's memory that the cache leaves free, for what no formula counts."""


@dataclass(frozen=True)
class Cache:
    """The key/value cache of a rank: `pages` of `page_bytes` each, for `rows` sequences of a replica, each of
    `columns` pages at full length. More than one sequence are no must: the others wait. It is `kept` when
    generation ends, or given back."""

    pages: int
    page_bytes: int
    rows: int
    columns: int
    kept: bool = False

    @property
    def together(self) -> int:
        """Sequences that have room at full length; the samples of a prompt share pages beside it."""
        return min(self.rows, max(1, (self.pages - 1) // self.columns))


def kv_bytes(spec: ModelSpec, layout: Layout, p: int, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` tokens on stage p."""
    kv_heads = max(1, spec.num_kv_heads // layout.tp)
    return 2 * itemsize * layout.stage_layers[p] * tokens * kv_heads * spec.head_dim


def whole_pages(prompt: int, new_tokens: int, page: int) -> int:
    """Pages of `page` positions that a sequence of `prompt` and `new_tokens` tokens needs in the end: the
    last token that it draws is never cached."""
    return -(-(prompt + new_tokens - 1) // page)


def wanted_pages(prompts: Sequence[tuple[int, int]], new_tokens: int, page: int, rows: int) -> int:
    """Pages for `rows` sequences at a time, all at full length. `prompts`: (tokens, samples) of each; samples
    share the pages that their prompt fills but for its last token."""
    most = shared = 0
    for length, samples in prompts:
        whole, columns = (length - 1) // page, whole_pages(length, new_tokens, page)
        most = max(most, columns)
        shared += whole + samples * (columns - whole)
    return min(shared, rows * most)
