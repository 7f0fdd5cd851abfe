"""Responses token by token: the decode ring of `plan.ring`, executed by every stage of a replica.

Requests join the rows of decode micro-batches, which chase one another through the stages; between two rounds
those that wait are prefilled for the rows that have come free. All ranks of a replica keep identical request
state (who holds which row and which pages, what was sampled, who has ended), so every stage makes the same
scheduling decisions without a broadcast: all read the same tokens at the same point of the schedule: the last
stage sends what it drew to the first, and from there it travels on in front of the hidden states of the next
step. Nobody waits for a word from all. A decode micro-batch without sequences goes round as a message of one
row.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from puzzle.engine.generate.memory import fitting_pages
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request, RequestStates, Response, StopRule, check_room
from puzzle.engine.generate.sampling import Fetched, Sampled, SamplingParams
from puzzle.engine.generate.scheduler import Changes, Prefill, Scheduler
from puzzle.engine.pipeline.executor import Execution, Executor
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.noise import row_seeds
from puzzle.plan.pages import PREFILL_TOKENS, wanted_pages, whole_pages
from puzzle.plan.pipeline.actions import Action, Op, Payload
from puzzle.plan.pipeline.decode_ring import Ring, ring_channels
from puzzle.plan.simulate.check import checked

HEADER = 8
"""Bytes of a sampled token and its log-probability in a message."""


@dataclass
class Tally:
    """What generation did on this rank: `rows` that passes drew for, `tokens` that responses keep of them,
    `prefilled` tokens that prefill passes read, and how often a sequence was `put_back`."""

    rows: int = 0
    tokens: int = 0
    prefilled: int = 0
    put_back: int = 0

    def add(self, session: DecodeRingStage) -> None:
        """What a session, which is over, did."""
        self.rows += session.rows
        self.tokens += sum(map(len, session.states.tokens))
        self.prefilled += session.prefilled
        self.put_back += session.scheduler.put_back


@torch.inference_mode()
def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    params: SamplingParams,
    executor: Executor | None = None,
    *,
    passes: ModelRunner | None = None,
    prefill: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    decode: int | None = None,
    most: int | None = None,
    pages: int | None = None,
    stop: StopRule | None = None,
    watch: Callable[[int, int], None] | None = None,
    heard: Callable[[int, list[int]], None] | None = None,
    tally: Tally | None = None,
    lookahead: int | None = None,
    graphs: bool = True,
    early_stop: bool = True,
) -> list[Response]:
    """A response to each request, in order, on every rank of the replica.

    `executor` is the pipeline's (None: one stage); all ranks of a run call, those without requests, too.
    `passes` keeps cache and graphs from call to call; without them, `graphs` says whether decode passes are
    recorded (on CUDA). `prefill` and `decode` are sequences per micro-batch (None: a decode micro-batch per
    stage); a prefill pass has at most `prefill_tokens` tokens, and longer sequences are cached in parts. At
    most `most` sequences are decoded at a time, in a cache of at most `pages` pages (None: as many as memory
    holds); the others wait. `watch(request, token)` hears of tokens as they are read, `heard(request, ids)`
    of a response when its last one is. The host reads tokens `lookahead` steps late (None: 1 on CUDA, else
    0): a row that has ended may be decoded once more, and that token is dropped. Without `early_stop` all
    rows are decoded to the end, and what comes after a stop is dropped. None of these changes a response.
    `stop` ends responses beside `params.stop_ids`, after `min_new_tokens`.

    UserError for an empty prompt, one too long for the model, or one that does not fit the device alone.
    """
    check_room(requests, params.max_new_tokens, decoder.spec.max_positions)
    executor = executor or Executor(World(0, 1, decoder.device), (0,), ((0,),))
    execution = executor.begin("generation", ring_channels(decoder.layout.pp))
    used = passes or ModelRunner(decoder, graphs)
    rows = min(most or len(requests), len(requests))
    sizes = (params.max_new_tokens, rows, decode, prefill_tokens)
    pages, page = _pages(used, requests, sizes, pages, executor.world)
    if not requests:
        execution.finish()
        return []
    _check_longest(requests, params.max_new_tokens, pages, page)
    if lookahead is None:
        lookahead = int(decoder.device.type == "cuda")
    ring = ring_of(decoder.layout.pp, min(rows, pages), decode)
    states = RequestStates(requests, params, stop, watch, heard)
    limits = (prefill, prefill_tokens)
    session = DecodeRingStage(used, ring, states, (pages, page), lookahead, early_stop, limits)
    session.run(execution)
    if passes is None:
        used.release()  # its recordings know it: the cache would stay until the next collection of cycles
    execution.finish(ring.unrolled(tuple(session.prefills)) if executor.world.clock is not None else None)
    if tally is not None:
        tally.add(session)
    return states.responses()


def _pages(
    passes: ModelRunner,
    requests: Sequence[Request],
    sizes: tuple[int, int, int | None, int],
    most: int | None,
    world: World,
) -> tuple[int, int]:
    """Pages for so many sequences at a time, all at full length if there is memory, `most` at most; and their
    positions. `sizes`: new tokens, sequences at a time, those of a decode pass, tokens of a prefill pass."""
    new_tokens, rows, decode, prefill_tokens = sizes
    prompts = Counter(tuple(request.prompt) for request in requests)
    lengths = [(len(prompt), samples) for prompt, samples in prompts.items()]
    longest = max((length for length, _ in lengths), default=0) + new_tokens
    page = passes.page_for(longest - 1)
    wanted = wanted_pages(lengths, new_tokens, page, rows)
    if requests:
        wanted = max(wanted, passes.room.pages)
    # Where pages run short, prefill passes may have to cache a sequence of any length again.
    tokens = min(max(longest, sum(length for length, _ in lengths)), prefill_tokens)
    cached = longest if longest > prefill_tokens else 0
    even = decode or -(-rows // passes.decoder.layout.pp)
    least = max((whole_pages(length, new_tokens, page) for length, _ in lengths), default=0)
    beside = (tokens, min(rows, even), cached)
    fitting = fitting_pages(passes, wanted, page, world, beside, least)
    return min(wanted, most or wanted, fitting), page


def _check_longest(requests: Sequence[Request], new_tokens: int, pages: int, page: int) -> None:
    """UserError if a sequence alone, at full length, exceeds the cache."""
    index = max(range(len(requests)), key=lambda i: len(requests[i].prompt))
    length = len(requests[index].prompt)
    if whole_pages(length, new_tokens, page) > pages:
        raise UserError(
            f"a key/value cache for prompt {index} ({length} tokens) and {new_tokens} new tokens does not fit"
            f" beside the weights: there is room for {max(0, pages) * page} tokens; lower max_new_tokens or"
            " max_prompt_tokens, or use more ranks (tp or pp)"
        )


def ring_of(stages: int, rows: int, decode: int | None) -> Ring:
    """The ring of so many rows, checked with three rounds and prefills between them, as all others are."""
    ring = Ring(stages, rows, min(decode or -(-rows // stages), rows))
    checked(Ring.unrolled, ring, ((1, 1), (), (1, 1)))
    return ring


def cut(prefills: Sequence[Prefill], most: int, tokens: int) -> list[list[Prefill]]:
    """Prefills by pass: at most `most` sequences and `tokens` tokens. Longer ones begin passes of their own,
    as many as they need; the last of these has room for others."""
    passes: list[list[Prefill]] = []
    room = 0
    for whole in prefills:
        count = len(whole.tokens)
        for start in range(0, count, tokens):
            part = replace(whole, tokens=whole.tokens[start : start + tokens], past=start)
            if not passes or len(passes[-1]) == most or len(part.tokens) > room or count > tokens > room:
                passes.append([])
                room = tokens
            passes[-1].append(part)
            room -= len(part.tokens)
    return passes


@dataclass
class _Share:
    """A decode micro-batch: of its rows, from `start` on, the first hold its requests.

    `drawn` are the requests of its latest pass, `rows` how many it had when the round began. Messages are as
    long: their receiver knows it when it makes room for them. `unread` are the tokens on their way to the
    host, and whose they are. `families` are those of the scheduler that the runner knows of.
    """

    number: int
    start: int
    order: list[int]
    drawn: tuple[int, ...] = ()
    rows: int = 0
    unread: deque[tuple[tuple[int, ...], Fetched]] = field(default_factory=deque)
    families: list[tuple[int, list[int]]] = field(default_factory=list)


class DecodeRingStage:
    """A stage's part in a ring (a `StageProgram`). `rows` and `prefilled` count what decode passes drew and
    prefill passes read, `prefills` are those of every round as in `RingSpec`."""

    def __init__(
        self,
        passes: ModelRunner,
        ring: Ring,
        states: RequestStates,
        memory: tuple[int, int],
        lookahead: int,
        early_stop: bool = True,
        prefill: tuple[int | None, int] = (None, PREFILL_TOKENS),
    ) -> None:
        """`memory`: pages of the cache, and positions of each; `prefill`: most sequences and tokens of a
        prefill pass."""
        self.passes, self.ring, self.states, self.lookahead = passes, ring, states, lookahead
        self.early_stop, (self._most, self._tokens) = early_stop, prefill
        self.decoder = passes.decoder
        prompts = [request.prompt for request in states.requests]
        new, groups = states.params.max_new_tokens, ring.spec().decode
        pages, page = memory
        self.scheduler = Scheduler(prompts, new, groups, pages, page, states.tokens, states.ended)
        self.shares = [
            _Share(j, start, order)
            for j, (start, order) in enumerate(zip(self.scheduler.starts, self.scheduler.groups, strict=True))
        ]
        self.rows = self.prefilled = 0
        self.prefills: list[tuple[int, ...]] = []
        self._passes: list[list[Prefill]] = []
        self._first = 0
        columns = max(whole_pages(len(prompt), new, page) for prompt in prompts)
        passes.start(groups, pages, page, columns, states.params, self.scheduler.sharing)
        if ring.num_stages > 1:
            short = ring.rows < len(prompts) or pages < ring.rows * columns
            passes.record(leaving=short or (early_stop and states.may_end))
        self._row_seeds = self._named()

    def _named(self) -> list[int]:
        requests = self.states.requests
        names = torch.tensor([(request.prompt_id, request.sample) for request in requests]).unbind(1)
        return row_seeds(self.states.params.seed, requests[0].iteration, *names).tolist()

    def run(self, execution: Execution) -> None:
        """Everything from prompts to ends."""
        models, step = {self.ring.model: self}, 0
        while True:
            changes = self._between()
            # The last tokens reach all stages with a round of nobody.
            on_their_way = self.ring.num_stages > 1 and any(share.drawn for share in self.shares)
            if not self.scheduler.busy and not on_their_way:
                break
            self._first += len(self._passes)
            most = self._most or -(-len(changes.prefills) // self.ring.num_stages)
            self._passes = cut(changes.prefills, most, self._tokens)
            if self._passes:
                execution.run(self.ring.prefill(self._first, len(self._passes)), models)
            self.prefills.append(tuple(map(len, self._passes)))
            self.passes.copy(changes.copies)
            self.passes.join(changes.joins, [self._row_seeds[join.request] for join in changes.joins])
            for share in self.shares:
                share.rows = len(share.order)
            step += 1
            execution.run(self.ring.round(step), models)
        execution.run(self.ring.drain(step), models)
        for share in self.shares:
            self._read(share, 0)

    def _between(self) -> Changes:
        """Who leaves, grows and joins between two rounds. A single stage has read more by then than the first
        of several could have."""
        if self.ring.num_stages == 1:
            for share in self.shares:
                self._read(share, self.lookahead if share.order else 0)
        changes = self.scheduler.between(self.early_stop)
        self.passes.move(changes.moves, changes.parked)
        self.passes.extend(changes.pages)
        return changes

    def buffer(self, action: Action) -> Tensor:
        """Prompts' hidden states (T/tp, D); token ids int32 (2, rows); or bytes: ids, then hidden states."""
        device, wide = self.decoder.device, self.decoder.spec.hidden_size
        if action.payload is Payload.ACTIVATION and not action.step:
            tokens = sum(len(part.tokens) for part in self._passes[action.microbatch - self._first])
            multiple = self.decoder.numerics.multiple
            here = -(-tokens // multiple) * multiple // self.decoder.layout.tp
            return torch.empty((here, wide), dtype=self.decoder.dtype, device=device)
        share = self.shares[action.microbatch]
        drew = len(share.drawn)
        if action.payload is Payload.TOKENS:
            return torch.empty((2, max(1, drew)), dtype=torch.int32, device=device)
        return torch.empty(self._size(drew, share.rows), dtype=torch.uint8, device=device)

    def compute(self, action: Action, received: Tensor | None) -> Sequence[Tensor]:
        """A prefill pass, or a decode pass of those of a micro-batch who have not ended."""
        if action.op is Op.PREFILL:
            parts = self._passes[action.microbatch - self._first]
            self.prefilled += sum(len(part.tokens) for part in parts)
            hidden = self.passes.prefill(parts, received)
            return () if self.decoder.last else (hidden,)
        message = self._decode(self.shares[action.microbatch], received)
        return (message,) if self.ring.num_stages > 1 else ()

    def optimize(self, op: Op) -> None:
        """Generation trains nothing."""
        raise AssertionError(op)

    def _decode(self, share: _Share, received: Tensor | None) -> Tensor:
        drew, before, scheduler = share.drawn, share.rows, self.scheduler
        sampled, hidden = self._opened(received, len(drew), before)
        if sampled is not None and drew:
            if not self.decoder.last:
                share.unread.append((drew, sampled.fetch()))
            if self.decoder.first:
                self.passes.put(sampled.tokens, self._rows_of(share))
        self._read(share, self.lookahead if share.order else 0)
        left = scheduler.leave(share.number, self.early_stop)
        self.passes.move(left.moves, left.parked)
        if self.passes.shares and share.families != (found := scheduler.families(share.number)):
            share.families = found
            self.passes.relate(share.number, found)
        active = len(share.order)
        self.rows += active
        share.drawn = tuple(share.order)
        out = None
        if active:
            out = self.passes.decode(share.number, active, None if hidden is None else hidden[:active])
            scheduler.drew(share.number)
        if isinstance(out, Sampled):
            share.unread.append((share.drawn, out.fetch()))
            return out.packed
        if self.decoder.last:
            return torch.zeros((2, 1), dtype=torch.int32, device=self.decoder.device)
        return self._sealed(sampled, out, len(drew), before)

    def _rows_of(self, share: _Share) -> Sequence[int]:
        """The rows of those who drew in the latest pass; -1 for who has left them since."""
        if tuple(share.order[: len(share.drawn)]) == share.drawn:
            return range(share.start, share.start + len(share.drawn))
        rows = {i: share.start + row for row, i in enumerate(share.order)}
        return [rows.get(i, -1) for i in share.drawn]

    def _size(self, drew: int, rows: int) -> int:
        """Bytes of a message to the next stage: tokens of who drew, hidden states of the round's rows."""
        return max(1, drew * HEADER + rows * self.decoder.spec.hidden_size * self.decoder.dtype.itemsize)

    def _opened(self, message: Tensor | None, drew: int, rows: int) -> tuple[Sampled | None, Tensor | None]:
        """What `drew` rows drew a step ago and, from the stage before, hidden states (rows, D)."""
        if message is None or self.decoder.first:
            return (None if message is None else Sampled(message)), None
        header = drew * HEADER
        sampled = Sampled(message[:header].view(torch.int32).view(2, drew))
        hidden = message[header:] if rows else message[:0]
        return sampled, hidden.view(self.decoder.dtype).view(rows, self.decoder.spec.hidden_size)

    def _sealed(self, sampled: Sampled | None, hidden: Tensor | None, drew: int, rows: int) -> Tensor:
        """The message to the next stage: hidden states of fewer than `rows` rows leave room at its end."""
        header, wide = drew * HEADER, self.decoder.spec.hidden_size * self.decoder.dtype.itemsize
        message = torch.empty(self._size(drew, rows), dtype=torch.uint8, device=self.decoder.device)
        if drew:
            assert sampled is not None
            message[:header].view(torch.int32).view(2, drew).copy_(sampled.packed)
        if hidden is not None:
            end = header + len(hidden) * wide
            message[header:end].view(self.decoder.dtype).view(len(hidden), -1).copy_(hidden)
        return message

    def _read(self, share: _Share, most: int) -> None:
        """Write down what was sampled, until at most `most` steps are unread."""
        while len(share.unread) > most:
            order, fetched = share.unread.popleft()
            self.states.write(order, *fetched.lists())
