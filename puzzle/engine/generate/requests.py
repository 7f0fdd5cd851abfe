"""What is asked of generation, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puzzle.engine.generate.sampling import SamplingParams
from puzzle.errors import UserError

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


class RequestStates:
    """What every request has sampled, and whether it has ended; the same on all ranks of a replica."""

    def __init__(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        stop: StopRule | None = None,
        watch: Callable[[int, int], None] | None = None,
        heard: Callable[[int, list[int]], None] | None = None,
    ) -> None:
        """`watch(request, token)` hears of tokens, `heard(request, tokens)` of responses that have ended."""
        self.requests, self.params, self._watch, self._heard = requests, params, watch, heard
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
            if self._heard is not None and self.ended[i]:
                self._heard(i, self.tokens[i])

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
