"""Passes of one pipeline stage over the rows of a key/value cache, drawing included, without waiting.

What a row's next pass needs stays on the device: its last token, the position of that token, how many tokens
it has sampled and what keys its noise. So a decode pass is the same work whatever the sequences are: on CUDA
it is recorded as a graph and replayed, and the host may run ahead of the device. It reads what was sampled
when it wants to (`Sampled.fetch`): a step late, or at the end.

A graph holds addresses and shapes, not lengths. Rows are rounded up to buckets, one graph each, by inactive
rows: these have no sequence, and what passes compute and write for them is never read. Weights, cache and
rows that lie where they lay are decoded by the graphs that there are; if any has moved, all are recorded
anew.

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
from puzzle.engine.generate.sampling import Sampled, SamplingParams, VocabShard, draw
from puzzle.engine.generate.scheduler import Join, Prefill
from puzzle.model.attention import MEMBERS, Families, KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, pack
from puzzle.plan.pages import PAGE

INACTIVE = -1
"""The position of a row without a sequence."""
SPARE = 1 << 30
"""Bytes that should be free on a device where a graph is recorded."""


@dataclass(frozen=True)
class Room:
    """The least that a runner makes room for, so that later calls find it where it was: rows, the most pages
    of one, and pages of the cache (0: as many as a call asks for)."""

    rows: int = 0
    columns: int = 0
    pages: int = 0


class ModelRunner:
    """The passes of `decoder`. Every rank of a tensor group makes the same calls in the same order.

    The rows are cut into groups, the decode micro-batches; in each, the sequences in use come first and
    the rows behind them are inactive. The cache and the graphs are kept until `release`; graphs are dropped
    when `start` finds anything that they read at another address. `captures` counts recordings,
    `capture_seconds` is their time.
    """

    def __init__(
        self, decoder: Decoder, graphs: bool = True, page: int | None = None, room: Room | None = None
    ) -> None:
        """Without `graphs`, or where none can be recorded, every pass is launched step by step. `page` is
        positions of a page; on CUDA a power of two, 16 or more. Without it they are `PAGE` there, and on a
        CPU a sequence has one page, so that rows are read where they lie."""
        self.decoder, self.room = decoder, room or Room()
        self.graphs = graphs and decoder.device.type == "cuda" and decoder.group.recordable
        self._page = page or (PAGE if decoder.device.type == "cuda" else None)
        self.captures, self.capture_seconds = 0, 0.0
        self.cache: KVCache | None = None
        self._recorded: dict[tuple[object, bool, object, int, int], CudaGraphDecode] = {}
        self._drawing: object = None
        self._addresses: tuple[int, ...] = ()
        self.warm: set[object] = set()  # what has been launched once: its kernels are there
        self.pool = self.stream = None

    @property
    def keeps(self) -> bool:
        """Whether cache and graphs stay between the iterations of a run."""
        return self.room.pages > 0

    def page_for(self, capacity: int) -> int:
        """Positions of a page for sequences of up to `capacity` cached tokens."""
        kept = 0 if self.cache is None else self.cache.page
        return self._page or max(kept, capacity)

    @torch.inference_mode()
    def start(
        self,
        groups: Sequence[int],
        pages: int,
        page: int,
        columns: int,
        params: SamplingParams,
        sharing: bool = False,
    ) -> None:
        """Make ready for decode micro-batches of `groups` rows each, in `pages` pages besides `NOBODY`, of
        `page` positions, of which a row has at most `columns`. All rows are inactive. Where rows may be
        `sharing` pages, kernels read these once for all of them (`relate`)."""
        decoder, rows = self.decoder, sum(groups)
        kept, room = self.cache, self.room
        if kept is None or kept.k.shape[2] <= pages or kept.page != page:
            self.release()
            self.cache = decoder.new_cache(1 + pages, page)
        if kept is not self.cache or self.table.shape[0] < rows or self.table.shape[1] < columns:
            self._forget()
            rows, columns = max(rows, room.rows), max(columns, room.columns)
            # token, position, tokens sampled, row seed of the noise
            self.state = torch.zeros((4, rows), dtype=torch.int64, device=decoder.device)
            self.table = torch.zeros((rows, columns), dtype=torch.int32, device=decoder.device)
            self.families = Families(self.table.new_zeros(rows, 1 + MEMBERS), self.table.new_zeros(rows))
        if not self.unmoved:
            self._forget()
            self._addresses = self._read_addresses()
        least = params.min_new_tokens if params.stop_ids else 0
        self._drawing = replace(params, min_new_tokens=least, max_new_tokens=1 << 30, seed=0)
        self.params, self.groups = params, tuple(groups)
        self.state.zero_()[1] = INACTIVE
        for told in self.families:
            told.zero_()
        # With a window there may be nothing that all see; and only kernels know of families.
        reads = decoder.numerics.pointwise(decoder.device, decoder.pointwise).decode is not None
        self.shares = sharing and reads and decoder.spec.sliding_window is None
        if decoder.last:
            width = decoder.head_weight.shape[0]
            self.shard = VocabShard(decoder.group, decoder.coord.t * width, width, decoder.numerics.log_total)

    @property
    def unmoved(self) -> bool:
        """Whether all that a graph reads lies where it lay when `start` was called last."""
        return self._addresses == self._read_addresses()

    def _read_addresses(self) -> tuple[int, ...]:
        cache, decoder = self.cache, self.decoder
        if cache is None:
            return ()
        told = (cache.k, cache.v, self.state, self.table, *self.families)
        return tuple(x.data_ptr() for x in (*decoder.parameters(), *decoder.buffers(), *told))

    @torch.inference_mode()
    def prefill(self, prefills: Sequence[Prefill], x: Tensor | None = None) -> Tensor:
        """Cache the tokens of `prefills` in their pages; hidden states (T/tp, D) to hand on. Only the first
        may go on behind tokens of its sequence that are cached.

        `x` are the hidden states received, on all stages but the first.
        """
        assert self.cache is not None
        decoder = self.decoder
        device, page, past = decoder.device, self.cache.page, prefills[0].past
        batch = pack([part.tokens for part in prefills], decoder.numerics.multiple, device, past)
        inner = torch.arange(page)
        whole = [(torch.tensor(part.pages)[:, None] * page + inner).flatten() for part in prefills]
        own = [places[part.past :][: len(part.tokens)] for part, places in zip(prefills, whole, strict=True)]
        before = whole[0][:past].to(device, non_blocking=True) if past else None
        cache = self.cache.at(torch.cat(own).to(device, non_blocking=True), past=before)
        return decoder(batch.tokens_T if x is None else x, batch, cache)

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
    def relate(self, group: int, families: Sequence[tuple[int, Sequence[int]]]) -> None:
        """From now on these rows of a group, counted from its first, share pages of so many positions, and no
        others do. More than `MEMBERS` rows are several families."""
        start, size = sum(self.groups[:group]), self.groups[group]
        members, shared = [], [0] * size
        for positions, rows in families:
            for some in (rows[at : at + MEMBERS] for at in range(0, len(rows), MEMBERS)):
                if len(some) > 1:
                    members.append([positions, *some, *[-1] * (MEMBERS - len(some))])
                    for row in some:
                        shared[row] = positions
        members += [[0] * (1 + MEMBERS)] * (size - len(members))
        self.families.members_FM[start : start + size] = self._put_there(members)
        self.families.shared_B[start : start + size] = self._put_there(shared)

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
        key = (self._drawing, self.shares, self.decoder.group.sums, start, rows)
        if key not in self._recorded:
            # A pass of this key launches the same kernels, wherever its tensors lie.
            shape = (*key, self.state.shape, self.table.shape)
            self._recorded[key] = CudaGraphDecode(self, start, start + rows, shape)
        return self._recorded[key]

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
        """Give the cache and the graphs back."""
        self._forget()
        self.cache, self._addresses = None, ()

    def rest(self) -> None:
        """Until it is used again others want the memory: give back what is not kept."""
        if not self.keeps:
            self.release()

    def _forget(self) -> None:
        self._recorded.clear()
        if self.graphs:
            # The memory that all graphs share: they run one after another. It ends with the last of them.
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = self.stream or torch.cuda.Stream()


class CudaGraphDecode:
    """The decode pass of rows [start, stop)."""

    def __init__(self, passes: ModelRunner, start: int, stop: int, kernels: object = None) -> None:
        """`kernels` says which kernels it launches: equal ones need no warm-up again."""
        assert passes.cache is not None
        decoder = passes.decoder
        self.passes, self.decoder, self._kernels = passes, decoder, kernels
        self.state, self.table, self.cache = (
            passes.state[:, start:stop],
            passes.table[start:stop],
            passes.cache,
        )
        # Of two rows at least each; so there are never more.
        members, shared = passes.families
        some = slice(start, start + max(1, (stop - start) // 2))
        self.families = Families(members[some], shared[start:stop]) if passes.shares else None
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
        batch, cache = (
            DecodeBatch(token_B, at_B, reach),
            self.cache.at(places_B, self.table, None, self.families),
        )
        out = self.decoder(token_B if self.inbox is None else self.inbox, batch, cache)
        if self.decoder.last:
            out = draw(self.decoder.logits(out), row_seed_B, count_B, self.passes.params, self.passes.shard)
            token_B.copy_(out[0])
        position_B.add_(position_B >= 0)
        count_B.add_(1)
        return out

    def record(self) -> None:
        """Make the graph. The state of its rows stays as it is.

        As `torch.cuda.graph` does, but for what that gives back first, always: torch's unused memory to the
        device (8 ms per GB), and pinned memory to the host.
        """
        stream, device = self.passes.stream, self.decoder.device
        assert stream is not None
        torch.cuda.synchronize(device)  # or what others have begun would count
        began = time.perf_counter()
        # Memory of its own: the next graph overwrites the pool's.
        rows, wide = self.state.shape[1], self.decoder.spec.hidden_size
        shape, dtype = ((2, rows), torch.int32) if self.decoder.last else ((rows, wide), self.decoder.dtype)
        self.out = torch.empty(shape, dtype=dtype, device=device)
        if self._kernels not in self.passes.warm:
            # A pass may be repeated from the same state: it writes the same to the same positions.
            held = self.state.clone()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.out.copy_(self._pass())
                self.state.copy_(held)
            self.passes.warm.add(self._kernels)
        torch.cuda.synchronize(device)
        if torch.cuda.mem_get_info(device)[0] < SPARE:
            torch.cuda.empty_cache()  # torch cannot while it records
        before = self.decoder.group.moved
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # Another thread watches NCCL: what it asks the device must not spoil the recording.
            graph.capture_begin(pool=self.passes.pool, capture_error_mode="thread_local")
            try:
                self.out.copy_(self._pass())
            finally:
                graph.capture_end()
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
