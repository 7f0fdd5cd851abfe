"""Passes of one pipeline stage over the rows of a key/value cache, drawing included, without waiting.

What a row's next pass needs stays on the device: its last token, the place of that token, how many tokens
it has drawn and what keys its noise. So a decode pass is the same work whatever the sequences are: on CUDA
it is recorded as a graph and replayed, and the host may run ahead of the device. It reads what was drawn
when it wants to (`Drawn.fetch`): a step late, or at the end.

A graph holds addresses and shapes, not lengths. Rows are rounded up to buckets, one graph each, by parked
rows: these have no sequence, and what passes compute and write for them is never read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzle.engine.sampling import SamplingParams, VocabShard, draw
from puzzle.engine.switcher import lends_pages
from puzzle.errors import UserError
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, pack
from puzzle.model.parallel import gather_tokens

PARKED = -1
"""The place of a row without a sequence."""

KEPT_FREE = 0.02
"""Share of the device's memory that the cache leaves for activations of passes."""


@dataclass(frozen=True)
class Drawn:
    """What a pass drew for its rows, on the device: int32 (2, B), ids and the bits of log-probabilities."""

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """int32 (B,)."""
        return self.packed[0]

    @property
    def logprobs(self) -> Tensor:
        """float32 (B,): log_softmax(logits / T) of the tokens."""
        return self.packed[1].view(torch.float32)

    def fetch(self) -> Fetched:
        """Start copying to the host; the device goes on."""
        return Fetched(self.packed)


class Fetched:
    """Drawn tokens on their way to the host."""

    def __init__(self, packed: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = packed
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def lists(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities by row; waits for the device if the pass is not done."""
        if self._event is not None:
            self._event.synchronize()
        return self._host[0].tolist(), self._host[1].view(torch.float32).tolist()


class StagePasses:
    """The passes of `decoder`. Every rank of a tensor group makes the same calls in the same order.

    The cache rows are cut into groups, the decode micro-batches; in each, the sequences in use come first and
    the rows behind them are parked. The cache and the graphs are kept until `release`; graphs are dropped
    when `start` finds the weights at other addresses or other groups or ways to draw. `captures` counts
    recordings, `capture_seconds` is their time.
    """

    def __init__(self, decoder: Decoder, graphs: bool = True) -> None:
        """Without `graphs`, or on a CPU, every pass is launched step by step."""
        self.decoder = decoder
        self.graphs = graphs and decoder.device.type == "cuda"
        self.captures, self.capture_seconds = 0, 0.0
        self.cache: KVCache | None = None
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._key: object = None
        self.pool = None

    @torch.inference_mode()
    def start(self, groups: Sequence[int], capacity: int, params: SamplingParams) -> None:
        """Make ready for sequences of up to `capacity` tokens in decode micro-batches of `groups` rows each.

        All rows are parked. UserError if the cache does not fit the device (it says what does).
        """
        decoder, rows = self.decoder, sum(groups)


def fitting_rows(decoder: Decoder, capacity: int, enough: float = math.inf) -> int | None:
    """How many sequences of `capacity` tokens fit the free memory of the device; None on a CPU.

    Where `enough` do, it may be more than that.
    """
    size = cache_bytes(decoder) * capacity
    memory = cache_memory(decoder.device, enough * size)
    return None if memory is None else memory // size


def cache_memory(device: torch.device, enough: float) -> int | None:
    """Bytes that a cache may take there now; None on a CPU.

    To give back what torch keeps unused, and take it again, costs 8 ms per GB. Single pages it can move
    itself; so these are given back only where they are not `enough`, to know what there is.
    """
    if device.type != "cuda":
        return None
    if lends_pages():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if (room := _room(device, unused)) >= enough:
            return room
    torch.cuda.empty_cache()
    return _room(device, 0)


def _room(device: torch.device, unused: int) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free + unused - KEPT_FREE * total))


def cache_bytes(decoder: Decoder) -> int:
    """Bytes of the keys and values of one token on this stage."""
    spec = decoder.spec
    kv_heads = max(1, spec.num_kv_heads // decoder.layout.tp)
    return 2 * len(decoder.layers) * kv_heads * spec.head_dim * decoder.dtype.itemsize
