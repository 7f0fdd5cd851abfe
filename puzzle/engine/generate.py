"""Responses token by token.

Packed prefill, then decoding over a key/value cache that shrinks as sequences end.

Every rank of a replica keeps the same books (who occupies which cache row, who has ended), because every
rank sees every drawn token. How hidden states travel between pipeline stages is the business of a
`Relay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puzzle.engine.sampling import SamplingParams, VocabShard, choose
from puzzle.errors import UserError
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.noise import row_keys
from puzzle.model.packing import DecodeBatch, PackedBatch, pack
from puzzle.model.parallel import gather_tokens

PREFILL_TOKENS = 8192
"""Most prompt tokens of one prefill pass (one prompt at least)."""


@dataclass(frozen=True)
class Request:
    """One response to draw: its prompt (not empty) and the names that key its noise."""

    prompt: Sequence[int]
    prompt_id: int = 0
    sample: int = 0
    iteration: int = 0


@dataclass(frozen=True)
class Response:
    """Drawn tokens (a stop token included), their log-probabilities, and whether a stop token ended them."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


Drawn = tuple[Tensor, Tensor]
"""Tokens int64 (B,) and log-probabilities float32 (B,)."""


class Relay(Protocol):
    """Moves a pass through the pipeline stages."""

    def new_cache(self, decoder: Decoder, rows: int, capacity: int) -> KVCache:
        """This stage's cache for `rows` sequences of up to `capacity` tokens; its contents mean nothing."""
        ...

    def run(self, decoder: Decoder, batch: PackedBatch | DecodeBatch, cache: KVCache) -> Tensor | None:
        """This stage's part of a pass; the final hidden states on the last stage, None elsewhere."""
        ...

    def share(self, drawn: Drawn | None, rows: int) -> Drawn:
        """What the last stage drew for `rows` rows, on every stage."""
        ...


class OneStage:
    """The relay of a pipeline of one stage."""

    def new_cache(self, decoder: Decoder, rows: int, capacity: int) -> KVCache:
        """A cache of the decoder's."""
        return decoder.new_cache(rows, capacity)

    def run(self, decoder: Decoder, batch: PackedBatch | DecodeBatch, cache: KVCache) -> Tensor | None:
        """The whole pass."""
        return decoder(batch.tokens_T, batch, cache)

    def share(self, drawn: Drawn | None, rows: int) -> Drawn:
        """What was drawn here."""
        assert drawn is not None
        return drawn


@torch.inference_mode()
def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    params: SamplingParams,
    relay: Relay | None = None,
    *,
    prefill: int | None = None,
    decode: int | None = None,
) -> list[Response]:
    """A response to each request, in order. UserError for an empty prompt or one too long for the model.

    `decode` requests at a time are in the cache (all by default); one prompt pass takes `prefill` of them at
    most, and no more than have `PREFILL_TOKENS` tokens. Neither changes a response.
    """
    check_room(requests, params.max_new_tokens, decoder.spec.max_positions)
    responses: list[Response] = []
    size = decode or max(1, len(requests))
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        session = _Session(decoder, part, params, relay or OneStage())
        session.prefill(prefill)
        while session.order:
            session.step()
        responses += session.responses()
    return responses


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


class _Session:
    """The running state: cache row r holds the sequence of request `order[r]`.

    Rows [0, len(order)) are active.
    """

    def __init__(
        self, decoder: Decoder, requests: Sequence[Request], params: SamplingParams, relay: Relay
    ) -> None:
        self.decoder, self.requests, self.params, self.relay = decoder, requests, params, relay
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.order = list(range(len(requests)))
        longest = max(len(request.prompt) for request in requests)
        self.cache = relay.new_cache(decoder, len(requests), longest + params.max_new_tokens)
        self.stops = frozenset(params.stop_ids)
        if decoder.last:
            width = decoder.head_weight.shape[0]
            self.shard = VocabShard(decoder.group, decoder.coord.t * width, width)

    def prefill(self, most: int | None) -> None:
        """Cache all prompts, at most `most` in one pass, and draw each one's first token."""
        start, count = 0, len(self.requests)
        while start < count:
            stop, total = start, 0
            limit = min(count, start + (most or count))
            while stop < limit:
                total += len(self.requests[stop].prompt)
                if stop > start and total > PREFILL_TOKENS:
                    break
                stop += 1
            prompts = [self.requests[i].prompt for i in range(start, stop)]
            batch = pack(prompts, self.decoder.layout.tp, self.decoder.device)
            hidden = self.relay.run(self.decoder, batch, self.cache.rows(start, stop))
            if hidden is not None:
                hidden = gather_tokens(hidden, self.decoder.group)[batch.last_rows]
            self._draw(hidden, self.order[start:stop])
            start = stop
        self._leave()

    def step(self) -> None:
        """One more token for every active row."""
        device = self.decoder.device
        places = [len(self.requests[i].prompt) + len(self.tokens[i]) - 1 for i in self.order]
        batch = DecodeBatch(
            torch.tensor([self.tokens[i][-1] for i in self.order], device=device),
            torch.tensor(places, device=device),
            max(places) + 1,
        )
        self._draw(self.relay.run(self.decoder, batch, self.cache), self.order)
        self._leave()

    def responses(self) -> list[Response]:
        """What was drawn, by request."""
        return [
            Response(tokens, logprobs, tokens[-1] in self.stops)
            for tokens, logprobs in zip(self.tokens, self.logprobs, strict=True)
        ]

    def _draw(self, hidden: Tensor | None, order: Sequence[int]) -> None:
        """Draw the next token of the requests in `order` from final hidden states (B, D); write it down."""
        drawn = None
        if hidden is not None:
            logits = self.decoder.logits(hidden)
            drawn = choose(logits, self._keys(order), self._young(order), self.params, self.shard)
        tokens, logprobs = self.relay.share(drawn, len(order))
        for i, token, logprob in zip(order, tokens.tolist(), logprobs.tolist(), strict=True):
            self.tokens[i].append(token)
            self.logprobs[i].append(logprob)

    def _keys(self, order: Sequence[int]) -> Tensor | None:
        if self.params.greedy:
            return None
        names = [(self.requests[i].prompt_id, self.requests[i].sample, len(self.tokens[i])) for i in order]
        prompt_ids, samples, places = torch.tensor(names, device=self.decoder.device).unbind(1)
        iteration = self.requests[order[0]].iteration
        return row_keys(self.params.seed, iteration, prompt_ids, samples, places)

    def _young(self, order: Sequence[int]) -> Tensor | None:
        young = [len(self.tokens[i]) < self.params.min_new_tokens for i in order]
        return torch.tensor(young, device=self.decoder.device) if any(young) else None

    def _leave(self) -> None:
        """Take ended sequences out; the last active row moves into each row that comes free."""
        for row in reversed(range(len(self.order))):
            tokens = self.tokens[self.order[row]]
            if tokens[-1] not in self.stops and len(tokens) < self.params.max_new_tokens:
                continue
            last = len(self.order) - 1
            moved = self.order.pop()
            if row != last:
                self.order[row] = moved
                self.cache.move(last, row, len(self.requests[moved].prompt) + len(self.tokens[moved]) - 1)
