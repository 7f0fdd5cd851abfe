"""Responses token by token: the decode ring of `plan.ring`, executed by every stage of a replica.

Prompts are cached pass by pass, then decode micro-batches chase one another through the stages. All ranks of
a replica keep identical request state (who holds which cache row, what was sampled, who has ended), so every
stage makes the same scheduling decisions without a broadcast: all read the same tokens at the same point of
the schedule: the last stage sends what it drew to the first, and from there it travels on in front of the
hidden states of the next step. Nobody waits for a word from all. A decode micro-batch in which everybody has
ended goes round as a message of one row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzle.engine.generate.model_runner import Fetched, ModelRunner, Sampled
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.executor import Execution, Executor
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.noise import row_seeds
from puzzle.plan.pipeline.actions import Action, Op, Payload
from puzzle.plan.pipeline.decode_ring import Ring, ring_channels
from puzzle.plan.simulate.check import checked

PREFILL_TOKENS = 8192
"""Most prompt tokens of one prefill pass (one prompt at least)."""

HEADER = 8
"""Bytes of a sampled token and its log-probability in a message."""

StopRule = Callable[[Sequence[int]], Callable[[int], bool]]
"""Makes a watcher for one response from the ids of its prompt: given each of its tokens in turn, it says
whether it is over."""


@dataclass(frozen=True)
class Request:
    """One response to draw: its prompt (not empty) and the names that key its noise."""

    prompt: Sequence[int]
    prompt_id: int = 0
    sample: int = 0
    iteration: int = 0


@dataclass(frozen=True)
class Response:
    """Sampled tokens (a stop token included), their log-probabilities, and whether a stop ended them."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Tally:
    """What generation did on this rank: `rows` that passes drew for, `tokens` that responses keep of them."""

    rows: int = 0
    tokens: int = 0


@torch.inference_mode()
def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    params: SamplingParams,
    executor: Executor | None = None,
    *,
    passes: ModelRunner | None = None,
    prefill: int | None = None,
    decode: int | None = None,
    stop: StopRule | None = None,
    watch: Callable[[int, int], None] | None = None,
    tally: Tally | None = None,
    lookahead: int | None = None,
    graphs: bool = True,
    early_stop: bool = True,
) -> list[Response]:
    """A response to each request, in order, on every rank of the replica.

    `executor` is the pipeline's (None: one stage); all ranks of a run call, those without requests, too.
    `passes` keeps cache and graphs from call to call; without them, `graphs` says whether decode passes are
    recorded (on CUDA). `prefill` and `decode` are sequences per micro-batch
    (None: a decode micro-batch per stage; a prefill pass never has more than `PREFILL_TOKENS` tokens).
    `watch(request, token)` hears of tokens as they are read. The host reads tokens `lookahead` steps late
    (None: 1 on CUDA, else 0): a row that has ended may be decoded once more, and that token is dropped.
    Without `early_stop` all rows are decoded to the end, and what comes after a stop is dropped. None of
    these changes a response. `stop` ends responses beside `params.stop_ids`, after `min_new_tokens`.

    UserError for an empty prompt, one too long for the model, or a cache that does not fit the device.
    """
    check_room(requests, params.max_new_tokens, decoder.spec.max_positions)
    executor = executor or Executor(World(0, 1, decoder.device), (0,), ((0,),))
    execution = executor.begin("generation", ring_channels(decoder.layout.pp))
    if not requests:
        execution.finish()
        return []
    if lookahead is None:
        lookahead = int(decoder.device.type == "cuda")
    ring = ring_of(decoder.layout.pp, [len(request.prompt) for request in requests], prefill, decode)
    states = RequestStates(requests, params, stop, watch)
    used = passes or ModelRunner(decoder, graphs)
    session = DecodeRingStage(used, ring, states, lookahead, early_stop)
    rounds = session.run(execution)
    if passes is None:
        used.release()  # its recordings know it: the cache would stay until the next collection of cycles
    execution.finish(ring.unrolled(rounds) if executor.world.clock is not None else None)
    if tally is not None:
        tally.rows += session.rows
        tally.tokens += sum(map(len, states.tokens))
    return states.responses()


def check_room(requests: Sequence[Request], new_tokens: int, max_positions: int) -> None:
    """UserError unless every prompt has tokens and room for `new_tokens` in the model's positions."""
    for index, request in enumerate(requests):
        if not request.prompt:
            raise UserError(f"prompt {index} is empty: it has no token to continue from")
        if len(request.prompt) + new_tokens > max_positions:
            raise UserError(
                f"prompt {index} has {len(request.prompt)} tokens: with {new_tokens} new ones it exceeds the"
                f" model's {max_positions} positions; shorten it or lower max_new_tokens"
            )


def ring_of(stages: int, lengths: Sequence[int], prefill: int | None, decode: int | None) -> Ring:
    """The ring for prompts of `lengths`, checked with two rounds: all further ones are the second's like."""
    count = len(lengths)
    even = -(-count // stages)
    most = max(1, PREFILL_TOKENS // max(lengths))
    ring = Ring(stages, count, min(prefill or even, most, count), min(decode or even, count))
    checked(Ring.unrolled, ring, 2)
    return ring


class RequestStates:
    """What every request has sampled, and whether it has ended; the same on all ranks of a replica."""

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        stop: StopRule | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.requests, self.params, self._watch = requests, params, watch
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.ended = [False] * len(requests)
        self._stop_ids = frozenset(params.stop_ids)
        self._watchers = None if stop is None else [stop(request.prompt) for request in requests]
        self._finished = [False] * len(requests)

    def write(self, order: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """The next token of each request in `order`; what was sampled after an end is dropped."""
        for i, token, logprob in zip(order, tokens, logprobs, strict=True):
            if self.ended[i]:
                continue
            self.tokens[i].append(token)
            self.logprobs[i].append(logprob)
            self._finished[i] = self._is_last(i, token)
            self.ended[i] = self._finished[i] or len(self.tokens[i]) >= self.params.max_new_tokens
            if self._watch is not None:
                self._watch(i, token)

    @property
    def may_end(self) -> bool:
        """Whether a response may be shorter than `max_new_tokens`."""
        return (bool(self._stop_ids) or self._watchers is not None) and (
            self.params.min_new_tokens < self.params.max_new_tokens
        )

    def _is_last(self, i: int, token: int) -> bool:
        # A watcher hears every token, also those of a response that may not end yet.
        said = self._watchers is not None and self._watchers[i](token)
        return token in self._stop_ids or (said and len(self.tokens[i]) >= self.params.min_new_tokens)

    def responses(self) -> list[Response]:
        """What was sampled, by request."""
        return [
            Response(*sampled) for sampled in zip(self.tokens, self.logprobs, self._finished, strict=True)
        ]


@dataclass
class _Share:
    """A decode micro-batch: of its cache rows, from `start` on, the first hold the requests `order`.

    `width` is the rows of its latest pass. Messages are as long: their receiver knows it when it makes room
    for them. `unread` are the tokens on their way to the host, and whose they are.
    """

    number: int
    start: int
    order: list[int]
    width: int
    unread: deque[tuple[tuple[int, ...], Fetched]] = field(default_factory=deque)

    def note(self, sampled: Sampled) -> None:
        """The rows of the latest pass drew these tokens."""
        self.unread.append((tuple(self.order), sampled.fetch()))


class DecodeRingStage:
    """A stage's part in a ring (a `StageProgram`); row r of the cache is request r's until rows come free."""

    def __init__(
        self, passes: ModelRunner, ring: Ring, states: RequestStates, lookahead: int, early_stop: bool = True
    ) -> None:
        self.passes, self.ring, self.states, self.lookahead = passes, ring, states, lookahead
        self.early_stop = early_stop
        self.decoder = passes.decoder
        self.spec = ring.spec(0)
        self.shares = [
            _Share(j, start, list(range(start, stop)), stop - start)
            for j, (start, stop) in enumerate(self.spec.decode)
        ]
        self.rows = 0
        prompts = [request.prompt for request in states.requests]
        capacity = max(map(len, prompts)) + states.params.max_new_tokens
        passes.start([share.width for share in self.shares], capacity, states.params)
        if ring.num_stages > 1:
            passes.record(leaving=early_stop and states.may_end)
        self._prompts, self._row_seeds = prompts, self._named()
        self._first = torch.zeros((2, ring.batch), dtype=torch.int32, device=self.decoder.device)

    def _named(self) -> list[int]:
        requests = self.states.requests
        names = torch.tensor([(request.prompt_id, request.sample) for request in requests]).unbind(1)
        return row_seeds(self.states.params.seed, requests[0].iteration, *names).tolist()

    def run(self, execution: Execution) -> int:
        """Everything from prompts to ends; how many rounds it took."""
        models = {self.ring.model: self}
        execution.run(self.ring.prefill(), models)
        step = 0
        while any(share.width for share in self.shares):
            step += 1
            execution.run(self.ring.round(step), models)
        execution.run(self.ring.drain(step), models)
        for share in self.shares:
            self._read(share, 0)
        return step

    def buffer(self, action: Action) -> Tensor:
        """Prompts' hidden states (T/tp, D); token ids int32 (2, rows); or bytes: ids, then hidden states."""
        device, wide = self.decoder.device, self.decoder.spec.hidden_size
        if action.payload is Payload.ACTIVATION and not action.step:
            start, stop = self.spec.prefill[action.microbatch]
            tp = self.decoder.layout.tp
            total = -(-sum(len(prompt) for prompt in self._prompts[start:stop]) // tp)
            return torch.empty((total, wide), dtype=self.decoder.dtype, device=device)
        rows = max(1, self.shares[action.microbatch].width)
        if action.payload is Payload.TOKENS:
            return torch.empty((2, rows), dtype=torch.int32, device=device)
        return torch.empty(
            rows * (HEADER + wide * self.decoder.dtype.itemsize), dtype=torch.uint8, device=device
        )

    def compute(self, action: Action, received: Tensor | None) -> Sequence[Tensor]:
        """A prefill pass, or a decode pass of those of a micro-batch who have not ended."""
        if action.op is Op.PREFILL:
            messages = self._prefill(action.microbatch, received)
        else:
            messages = [self._decode(self.shares[action.microbatch], action.step, received)]
        return messages if self.ring.num_stages > 1 else ()

    def optimize(self, op: Op) -> None:
        """Generation trains nothing."""
        raise AssertionError(op)

    def _prefill(self, index: int, received: Tensor | None) -> list[Tensor]:
        start, stop = self.spec.prefill[index]
        out = self.passes.prefill(
            range(start, stop), self._prompts[start:stop], self._row_seeds[start:stop], received
        )
        self.rows += stop - start
        if not isinstance(out, Sampled):
            return [out]
        self._first[:, start:stop] = out.packed
        whole = [share for share in self.shares if start < share.start + share.width <= stop]
        messages = []
        for share in whole:
            first = Sampled(self._first[:, share.start : share.start + share.width])
            share.note(first)
            messages.append(first.packed)
        return messages

    def _decode(self, share: _Share, step: int, received: Tensor | None) -> Tensor:
        first, last, width = self.decoder.first, self.decoder.last, share.width
        sampled, hidden = (None, None) if received is None else self._opened(received, max(1, width))
        if sampled is not None and width:
            if not last:
                share.note(sampled)
            if first:
                self.passes.put(sampled.tokens, range(share.start, share.start + width))
        self._read(share, self.lookahead)
        self._leave(share, step)
        active = share.width = len(share.order)
        self.rows += active
        out = None
        if active:
            x = None if hidden is None else hidden[:active]
            out = self.passes.decode(share.number, active, x)
        if isinstance(out, Sampled):
            share.note(out)
            return out.packed
        if last:
            return self._first.new_zeros((2, 1))
        assert sampled is not None
        return self._sealed(sampled, out, max(1, width))

    def _opened(self, message: Tensor, rows: int) -> tuple[Sampled, Tensor | None]:
        """What `rows` rows drew a step ago and, from the stage before, their hidden states (rows, D)."""
        if self.decoder.first:
            return Sampled(message), None
        header = rows * HEADER
        sampled = Sampled(message[:header].view(torch.int32).view(2, rows))
        return sampled, message[header:].view(self.decoder.dtype).view(rows, -1)

    def _sealed(self, sampled: Sampled, hidden: Tensor | None, rows: int) -> Tensor:
        """The message to the next stage: hidden states of fewer rows than drew leave room at its end."""
        header, wide = rows * HEADER, self.decoder.spec.hidden_size * self.decoder.dtype.itemsize
        message = torch.empty(header + rows * wide, dtype=torch.uint8, device=self.decoder.device)
        message[:header].view(torch.int32).view(2, rows).copy_(sampled.packed)
        if hidden is not None:
            end = header + len(hidden) * wide
            message[header:end].view(self.decoder.dtype).view(len(hidden), -1).copy_(hidden)
        return message

    def _read(self, share: _Share, most: int) -> None:
        """Write down what was sampled, until at most `most` steps are unread."""
        while len(share.unread) > most:
            order, fetched = share.unread.popleft()
            self.states.write(order, *fetched.lists())

    def _leave(self, share: _Share, step: int) -> None:
        """Take out who has ended; the last row in use moves into each row that comes free."""
        before, states, order = len(share.order), self.states, share.order
        full = step >= states.params.max_new_tokens
        for row in reversed(range(before)):
            if not (full or (self.early_stop and states.ended[order[row]])):
                continue
            moved = order.pop()
            if row < len(order):
                order[row] = moved
                cached = len(self._prompts[moved]) + step - 1
                self.passes.move(share.start + len(order), share.start + row, cached)
        if len(order) < before:
            self.passes.park(range(share.start + len(order), share.start + before))
