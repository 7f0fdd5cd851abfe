"""Passes of one pipeline stage over the rows of a key/value cache, drawing included, without waiting.

What a row's next pass needs stays on the device: its last token, the position of that token, how many tokens
it has sampled and what keys its noise. So a decode pass is the same work whatever the sequences are: on CUDA
it is recorded as a graph and replayed, and the host may run ahead of the device. It reads what was sampled
when it wants to (`Sampled.fetch`): a step late, or at the end.

A graph holds addresses and shapes, not lengths. Rows are rounded up to buckets, one graph each, by inactive
rows: these have no sequence, and what passes compute and write for them is never read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzle.engine.generate.sampling import SamplingParams, VocabShard, draw
from puzzle.engine.reshard.resharder import lends_pages
from puzzle.errors import UserError
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, pack
from puzzle.model.parallel import gather_tokens

INACTIVE = -1
"""The position of a row without a sequence."""

KEPT_FREE = 0.02
"""Share of the device's memory that the cache leaves for activations of passes."""


@dataclass(frozen=True)
class Sampled:
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
    """Sampled tokens on their way to the host."""

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


class ModelRunner:
    """The passes of `decoder`. Every rank of a tensor group makes the same calls in the same order.

    The cache rows are cut into groups, the decode micro-batches; in each, the sequences in use come first and
    the rows behind them are inactive. The cache and the graphs are kept until `release`; graphs are dropped
    when `start` finds the weights at other addresses or other groups or ways to draw. `captures` counts
    recordings, `capture_seconds` is their time.
    """

    def __init__(self, decoder: Decoder, graphs: bool = True) -> None:
        """Without `graphs`, or on a CPU, every pass is launched step by step."""
        self.decoder = decoder
        self.graphs = graphs and decoder.device.type == "cuda"
        self.captures, self.capture_seconds = 0, 0.0
        self.cache: KVCache | None = None
        self._recorded: dict[tuple[int, int], CudaGraphDecode] = {}
        self._key: object = None
        self.pool = None

    @torch.inference_mode()
    def start(self, groups: Sequence[int], capacity: int, params: SamplingParams) -> None:
        """Make ready for sequences of up to `capacity` tokens in decode micro-batches of `groups` rows each.

        All rows are inactive. UserError if the cache does not fit the device (it says what does).
        """
        decoder, rows = self.decoder, sum(groups)
        kept = self.cache
        if kept is None or kept.k.shape[1] < rows or kept.k.shape[3] < capacity:
            self.release()
            check_fit(decoder, rows, capacity)
            self.cache = decoder.new_cache(rows, capacity)
            # token, position, tokens sampled, row seed of the noise
            self.state = torch.zeros((4, rows), dtype=torch.int64, device=decoder.device)
        addresses = tuple(weight.data_ptr() for weight in decoder.parameters())
        least = params.min_new_tokens if params.stop_ids else 0
        drawing = replace(params, min_new_tokens=least, max_new_tokens=1 << 30, seed=0)
        key = (tuple(groups), drawing, addresses)
        if key != self._key:
            self._forget()
            self._key = key
        self.params, self.groups = params, tuple(groups)
        self.state.zero_()[1] = INACTIVE
        if decoder.last:
            width = decoder.head_weight.shape[0]
            self.shard = VocabShard(decoder.group, decoder.coord.t * width, width)

    @torch.inference_mode()
    def prefill(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        row_seeds: Sequence[int],
        x: Tensor | None = None,
    ) -> Sampled | Tensor:
        """Cache `prompts` in the cache rows `rows` and draw each one's first token.

        The last stage gives `Sampled`, others hidden states (T/tp, D) to hand on. `x` are the hidden states
        received, on all stages but the first; `row_seeds` the rows' `noise.row_seeds`.
        """
        assert self.cache is not None
        decoder = self.decoder
        batch = pack(prompts, decoder.layout.tp, decoder.device)
        hidden = decoder(batch.tokens_T if x is None else x, batch, self.cache.pick(rows))
        lengths = [len(prompt) for prompt in prompts]
        fresh = torch.tensor([[0] * len(rows), lengths, [0] * len(rows), list(row_seeds)])
        fresh = fresh.to(decoder.device, non_blocking=True)
        out: Sampled | Tensor = hidden
        if decoder.last:
            chosen = gather_tokens(hidden, decoder.group)[batch.last_rows]
            packed = draw(decoder.logits(chosen), fresh[3], fresh[2], self.params, self.shard)
            fresh[0] = packed[0]
            out = Sampled(packed)
        fresh[2] += 1
        self.state[:, torch.tensor(rows).to(decoder.device, non_blocking=True)] = fresh
        return out

    @torch.inference_mode()
    def decode(self, group: int, active: int, x: Tensor | None = None) -> Sampled | Tensor:
        """One more token for the first `active` rows of a group, none of them inactive.

        The last stage gives `Sampled`, others hidden states (active, D), good until the group's next pass.
        """
        rows = min(bucket(active), self.groups[group]) if self.graphs else active
        return self._recording(group, rows).run(active, x)

    @torch.inference_mode()
    def record(self, leaving: bool) -> None:
        """Record what `decode` may ask for: of every group all rows, or all buckets if rows may leave early.

        To record waits for all that the device has begun, and so does the first use of a kernel. Once a ring
        runs, that holds receives whose senders may be waiting in the same way. So a pipeline of several
        stages records before its first message; a single stage records what it turns out to need.
        """
        if not self.graphs:
            return
        for group, size in enumerate(self.groups):
            for rows in sorted({min(bucket(n), size) for n in range(1 if leaving else size, size + 1)}):
                recording = self._recording(group, rows)
                if recording.graph is None:
                    recording.record()

    def _recording(self, group: int, rows: int) -> CudaGraphDecode:
        start = sum(self.groups[:group])
        if (start, rows) not in self._recorded:
            self._recorded[start, rows] = CudaGraphDecode(self, start, start + rows)
        return self._recorded[start, rows]

    @torch.inference_mode()
    def put(self, tokens: Tensor, rows: Sequence[int]) -> None:
        """On the first of several stages: the ids (n,) that the last stage drew for `rows`."""
        self.state[0, torch.tensor(rows).to(tokens.device, non_blocking=True)] = tokens.long()

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """The sequence of row `source`, `length` cached tokens long, goes on in row `target`."""
        assert self.cache is not None
        self.cache.move(source, target, length)
        self.state[:, target] = self.state[:, source]
        self.state[1, source] = INACTIVE

    @torch.inference_mode()
    def park(self, rows: Sequence[int]) -> None:
        """These rows have no sequence any more."""
        self.state[1, torch.tensor(rows).to(self.state.device, non_blocking=True)] = INACTIVE

    def __enter__(self) -> ModelRunner:
        """Keep cache and graphs as long as the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release. A communicator never ends while a graph holds its collectives."""
        self.release()

    def release(self) -> None:
        """Give the cache and the graphs back (training wants the memory)."""
        self._forget()
        self.cache, self._key = None, None

    def _forget(self) -> None:
        self._recorded.clear()
        if self.graphs:
            # The memory that all graphs share: they run one after another. It ends with the last of them.
            self.pool = torch.cuda.graph_pool_handle()


class CudaGraphDecode:
    """The decode pass of rows [start, stop)."""

    def __init__(self, passes: ModelRunner, start: int, stop: int) -> None:
        assert passes.cache is not None
        decoder = passes.decoder
        self.passes, self.decoder = passes, decoder
        self.state, self.cache = passes.state[:, start:stop], passes.cache.rows(start, stop)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inbox: Tensor | None = None
        if not decoder.first:
            shape = (stop - start, decoder.spec.hidden_size)
            self.inbox = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.out: Tensor | None = None
        self.moved = 0  # bytes through collectives of a replay

    def run(self, active: int, x: Tensor | None) -> Sampled | Tensor:
        if self.inbox is not None:
            assert x is not None
            self.inbox[:active] = x
        if not self.passes.graphs:
            self.out = self._pass()
        else:
            if self.graph is None:
                self.record()
            assert self.graph is not None
            self.graph.replay()
            self.decoder.group.moved += self.moved
        assert self.out is not None
        if not self.decoder.last:
            return self.out[:active]
        return Sampled(self.out[:, :active].clone())

    def _pass(self) -> Tensor:
        """Sampled tokens (2, B) or hidden states (B, D); the rows' state goes a step on."""
        token_B, position_B, count_B, row_seed_B = self.state
        at_B = position_B.clamp(min=0)  # a inactive row writes over its own first position
        # Kernels read lengths on the device; without them the host may wait.
        reach = self.cache.k.shape[3] if at_B.is_cuda else int(at_B.max()) + 1
        batch = DecodeBatch(token_B, at_B, reach)
        out = self.decoder(token_B if self.inbox is None else self.inbox, batch, self.cache)
        if self.decoder.last:
            out = draw(self.decoder.logits(out), row_seed_B, count_B, self.passes.params, self.passes.shard)
            token_B.copy_(out[0])
        position_B.add_(position_B >= 0)
        count_B.add_(1)
        return out

    def record(self) -> None:
        """Make the graph. The state of its rows stays as it is."""
        began = time.perf_counter()
        # Warm up. A pass may be repeated from the same state: it writes the same to the same positions.
        held = self.state.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.out = self._pass()
            self.state.copy_(held)
        torch.cuda.current_stream().wait_stream(side)
        before = self.decoder.group.moved
        graph = torch.cuda.CUDAGraph()
        # Another thread watches NCCL: what it asks the device must not spoil the recording.
        with torch.cuda.graph(graph, pool=self.passes.pool, capture_error_mode="thread_local"):
            self.out.copy_(self._pass())  # to memory of its own: the next graph overwrites the pool's
        self.graph = graph
        self.moved = self.decoder.group.moved - before
        self.decoder.group.moved = before
        self.passes.captures += 1
        self.passes.capture_seconds += time.perf_counter() - began


def bucket(rows: int) -> int:
    """Rows of the smallest graph for `rows`: a power of two, beyond 256 a step of an eighth of one.

    To record a graph takes as long as several passes; a inactive row takes little: nothing is cached for it,
    and up to 256 rows or so products take the time of reading the weights.
    """
    power = 1 << (rows - 1).bit_length()
    step = power if power <= 256 else power // 8
    return -(-rows // step) * step


def check_fit(decoder: Decoder, rows: int, capacity: int) -> None:
    """UserError if the cache of `rows` sequences of `capacity` tokens exceeds the device's free memory."""
    fits = fitting_rows(decoder, capacity, rows)
    if fits is not None and rows > fits:
        raise UserError(
            f"a key/value cache for {rows} sequences of {capacity} tokens does not fit beside the weights:"
            f" {fits} of a replica's sequences do; lower the batch or max_new_tokens, or use more ranks"
        )


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
