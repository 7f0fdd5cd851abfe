"""Decode passes of one pipeline stage recorded as CUDA graphs: a replay launches a thousand kernels at once.

A graph holds addresses and shapes. So rows and reach are rounded up to buckets, token ids and positions live
in buffers of the bucket's size, and the key/value cache is kept from one call to the next. Rows behind the
active ones belong to sequences that have ended: what a padded pass writes there is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.engine.generate import OneStage
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, PackedBatch

ROWS, REACH = 8, 64
"""Buckets: multiples of so many rows and cached places."""


class GraphedStage(OneStage):
    """The relay of a pipeline of one stage; on a CPU the same padded passes run without graphs.

    `captures` counts recordings.
    """

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._passes: dict[tuple[int, int], _Recorded] = {}
        self.captures = 0

    def new_cache(self, decoder: Decoder, rows: int, capacity: int) -> KVCache:
        """The cache of an earlier call, if it is large enough: then its graphs are good still."""
        kept = self._cache
        if kept is None or kept.k.shape[1] < rows or kept.k.shape[3] < capacity:
            self.release()
            self._cache = super().new_cache(decoder, rows, capacity)
        assert self._cache is not None
        return self._cache

    def run(self, decoder: Decoder, batch: PackedBatch | DecodeBatch, cache: KVCache) -> Tensor | None:
        """The whole pass; final hidden states of a decode pass are good until the next one."""
        if isinstance(batch, PackedBatch):
            return super().run(decoder, batch, cache)
        assert cache is self._cache, "the cache of another call"
        bucket = (
            min(-(-len(batch.tokens_T) // ROWS) * ROWS, cache.k.shape[1]),
            min(-(-batch.reach // REACH) * REACH, cache.k.shape[3]),
        )
        if bucket not in self._passes:
            self._passes[bucket] = _Recorded(decoder, cache, *bucket)
            self.captures += 1
        return self._passes[bucket].run(batch)

    def release(self) -> None:
        """Give the cache and all graphs back."""
        self._passes.clear()
        self._cache = None


class _Recorded:
    """The pass of one bucket."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int, reach: int) -> None:
        self.decoder, self.cache = decoder, cache
        tokens, positions = torch.zeros((2, rows), dtype=torch.int64, device=decoder.device).unbind()
        self.batch = DecodeBatch(tokens, positions, reach)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor | None = None

    def run(self, batch: DecodeBatch) -> Tensor:
        """Final hidden states (B, D) of `batch`."""
        count = len(batch.tokens_T)
        for held, given in (
            (self.batch.tokens_T, batch.tokens_T),
            (self.batch.positions_T, batch.positions_T),
        ):
            held[:count] = given
            held[count:] = 0
        if self.decoder.device.type != "cuda":
            self.hidden = self._pass()
        elif self.graph is None:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        assert self.hidden is not None
        return self.hidden[:count]

    def _pass(self) -> Tensor:
        return self.decoder(self.batch.tokens_T, self.batch, self.cache)

    def _record(self) -> None:
        # A pass may be repeated: it writes the same keys and values to the same places.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._pass()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread watches NCCL: what it asks the device must not spoil the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.hidden = self._pass()
        self.graph = graph
