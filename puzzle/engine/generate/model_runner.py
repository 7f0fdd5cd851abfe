"""Passes of one pipeline stage over the rows of a key/value cache, drawing included, without waiting.

What a row's next pass needs stays on the device: its last token, the position of that token, how many tokens
it has sampled and what keys its noise. So a decode pass is the same work whatever the sequences are: on CUDA
it is recorded as a graph and replayed, and the host may run ahead of the device. It reads what was sampled
when it wants to (`Sampled.fetch`): a step late, or at the end.

A graph holds addresses and shapes, not lengths. Rows are rounded up to buckets, one graph each, by inactive
rows: these have no sequence, and what passes compute and write for them is never read.

Keys and values lie in pages; a row's are named by its line of a block table on the device. So a sequence
changes its row without its keys and values, and sequences with one prompt share its pages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzle.engine.generate.pages import NOBODY
from puzzle.engine.generate.sampling import SamplingParams, VocabShard, draw
from puzzle.engine.generate.scheduler import Join, Prefill
from puzzle.engine.reshard.resharder import lends_pages
from puzzle.engine.runtime.world import World
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, pack
from puzzle.plan.layout import Placement
from puzzle.plan.memory import Use, generation_passes
from puzzle.plan.pages import KEPT_FREE, PAGE, kv_bytes

INACTIVE = -1
"""The position of a row without a sequence."""


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

    The rows are cut into groups, the decode micro-batches; in each, the sequences in use come first and
    the rows behind them are inactive. The cache and the graphs are kept until `release`; graphs are dropped
    when `start` finds the weights at other addresses or other groups or ways to draw. `captures` counts
    recordings, `capture_seconds` is their time.
    """

    def __init__(self, decoder: Decoder, graphs: bool = True, page: int | None = None) -> None:
        """Without `graphs`, or on a CPU, every pass is launched step by step. `page` is positions of a page;
        on CUDA a power of two, 16 or more. Without it they are `PAGE` there, and on a CPU a sequence has one
        page, so that rows are read where they lie."""
        self.decoder = decoder
        self.graphs = graphs and decoder.device.type == "cuda"
        self._page = page or (PAGE if decoder.device.type == "cuda" else None)
        self.captures, self.capture_seconds = 0, 0.0
        self.cache: KVCache | None = None
        self._recorded: dict[tuple[int, int], CudaGraphDecode] = {}
        self._key: object = None
        self.pool = None

    def page_for(self, capacity: int) -> int:
        """Positions of a page for sequences of up to `capacity` cached tokens."""
        kept = 0 if self.cache is None else self.cache.page
        return self._page or max(kept, capacity)

    @torch.inference_mode()
    def start(
        self, groups: Sequence[int], pages: int, page: int, columns: int, params: SamplingParams
    ) -> None:
        """Make ready for decode micro-batches of `groups` rows each, in `pages` pages besides `NOBODY`, of
        `page` positions, of which a row has at most `columns`. All rows are inactive."""
        decoder, rows = self.decoder, sum(groups)
        kept = self.cache
        if kept is None or kept.k.shape[2] <= pages or kept.page != page:
            self.release()
            self.cache = decoder.new_cache(1 + pages, page)
        if kept is not self.cache or self.table.shape[0] < rows or self.table.shape[1] < columns:
            self._forget()
            # token, position, tokens sampled, row seed of the noise
            self.state = torch.zeros((4, rows), dtype=torch.int64, device=decoder.device)
            self.table = torch.zeros((rows, columns), dtype=torch.int32, device=decoder.device)
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
    def prefill(self, prefills: Sequence[Prefill], x: Tensor | None = None) -> Tensor:
        """Cache the tokens of `prefills` in their pages; hidden states (T/tp, D) to hand on.

        `x` are the hidden states received, on all stages but the first.
        """
        assert self.cache is not None
        decoder = self.decoder
        batch = pack([part.tokens for part in prefills], decoder.layout.tp, decoder.device)
        page = self.cache.page
        inner = torch.arange(page)
        places = torch.cat(
            [
                (torch.tensor(part.pages)[:, None] * page + inner).flatten()[: len(part.tokens)]
                for part in prefills
            ]
        )
        places = places.to(decoder.device, non_blocking=True)
        return decoder(batch.tokens_T if x is None else x, batch, self.cache.at(places))

    @torch.inference_mode()
    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) of the cache."""
        assert self.cache is not None
        if pages:
            self.cache.copy(*self._put_there(list(zip(*pages, strict=True))))

    @torch.inference_mode()
    def extend(self, pages: Sequence[tuple[int, int, int]]) -> None:
        """(row, column, page): the row goes on in that page."""
        if pages:
            rows, columns, numbers = self._put_there(list(zip(*pages, strict=True)))
            self.table[rows, columns] = numbers.int()

    @torch.inference_mode()
    def join(self, joins: Sequence[Join], row_seeds: Sequence[int]) -> None:
        """What rows decode from now on, and what keys their noise (`noise.row_seeds`)."""
        if not joins:
            return
        told = [
            (join.row, join.token, join.position, join.drawn, seed)
            for join, seed in zip(joins, row_seeds, strict=True)
        ]
        fresh = self._put_there(list(zip(*told, strict=True)))
        self.state[:, fresh[0]] = fresh[1:]
        width = max(len(join.pages) for join in joins)
        pages = self._put_there([[*join.pages, *[NOBODY] * (width - len(join.pages))] for join in joins])
        self.table[fresh[0], :width] = pages.int()

    def _put_there(self, numbers: Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
        """int64 on the device, which is not waited for."""
        return torch.tensor(numbers, dtype=torch.int64).to(self.decoder.device, non_blocking=True)

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
        """On the first of several stages: the ids (n,) that the last stage drew for `rows`; -1: for none."""
        kept = [i for i, row in enumerate(rows) if row >= 0]
        if len(kept) < len(rows):
            tokens, rows = tokens[self._put_there(kept)], [rows[i] for i in kept]
        self.state[0, self._put_there(rows)] = tokens.long()

    @torch.inference_mode()
    def move(self, moves: Sequence[tuple[int, int]], parked: Sequence[int]) -> None:
        """The sequence of each row (source, target) goes on in another one; `parked` have none any more."""
        if moves:
            sources, targets = self._put_there(list(zip(*moves, strict=True)))
            self.state[:, targets] = self.state[:, sources]
            self.table[targets] = self.table[sources]
        if parked:
            self.state[1, self._put_there(parked)] = INACTIVE

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
        self.state, self.table, self.cache = (
            passes.state[:, start:stop],
            passes.table[start:stop],
            passes.cache,
        )
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
        at_B, page = position_B.clamp(min=0), self.cache.page
        pages_B = self.table.gather(1, (at_B // page)[:, None])[:, 0]
        places_B = torch.where(position_B >= 0, pages_B, NOBODY).long() * page + at_B % page
        # Kernels read lengths on the device; without them the host may wait.
        reach = self.table.shape[1] * page if at_B.is_cuda else int(at_B.max()) + 1
        batch, cache = DecodeBatch(token_B, at_B, reach), self.cache.at(places_B, self.table)
        out = self.decoder(token_B if self.inbox is None else self.inbox, batch, cache)
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

    To record a graph takes as long as several passes; an inactive row takes little: nothing is cached for it,
    and up to 256 rows or so products take the time of reading the weights.
    """
    power = 1 << (rows - 1).bit_length()
    step = power if power <= 256 else power // 8
    return -(-rows // step) * step


def fitting_pages(passes: ModelRunner, wanted: int, page: int, world: World, tokens: int, rows: int) -> int:
    """Pages of `page` positions that the memory of every rank holds, besides the weights, prefill passes of
    `tokens` tokens and decode passes of `rows` rows; all ranks of the run ask.

    A cache that is there is given back, unless it has as many as are wanted. On a CPU as many as are wanted.
    """
    decoder = passes.decoder
    if decoder.device.type != "cuda":
        return wanted
    if not wanted:
        held = 1 << 60
    elif passes.cache is not None and passes.cache.k.shape[2] > wanted:
        held = passes.cache.k.shape[2] - 1
    else:
        passes.release()
        use = Use("model", decoder.spec, Placement.default(decoder.layout), decoder.dtype.itemsize)
        beside = sum(generation_passes(use, decoder.coord.p, tokens, rows).values())
        size = cache_bytes(decoder) * page
        held = ((cache_memory(decoder.device, (wanted + 1) * size + beside) or 0) - beside) // size - 1
    return -int(world.max(torch.tensor(-held, device=world.device)))


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
    return kv_bytes(decoder.spec, decoder.layout, decoder.coord.p, 1, decoder.dtype.itemsize)
