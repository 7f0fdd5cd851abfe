"""Which tokens of a chat the assistant says: by the template's own marks, or by prefixes that are checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from puzzle.data.clock import at
from puzzle.data.records import EmptyRow
from puzzle.data.tokenizers import Tokenizer, bare, encode, foreign, render
from puzzle.errors import UserError

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What transformers' chat templates put before the words of the assistant."""
Span = tuple[int, int]
"""A half-open interval."""


@dataclass(frozen=True)
class Labelled:
    """Tokens, and the spans of them that a model learns to say; ascending, none empty, none overlapping."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def ended(self) -> Labelled:
        """Without what follows the last learned token."""
        return Labelled(self.tokens[: self.spans[-1][1]], self.spans)

    @property
    def learned(self) -> list[int]:
        """Positions of the tokens that are learned: the first token follows nothing."""
        return [place for start, stop in self.spans for place in range(max(1, start), stop)]


def label_text(tokenizer: Tokenizer, prompt: str, response: str) -> Labelled:
    """Prompt and response as plain text, of which the response is learned, and the end behind it.

    The text is one where its tokens begin with those of the prompt, which is what generation goes on from;
    else the response is tokenised apart.
    """
    asked, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + response)
    if whole[: len(asked)] != asked:
        whole = [*asked, *bare(tokenizer, response)]
    eos = tokenizer.eos_token_id
    tokens = (*whole, *(() if eos is None else (int(eos),)))
    return Labelled(tokens, _kept([(len(asked), len(tokens))]))


def label_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    last: bool = False,
    now: datetime | None = None,
) -> Labelled:
    """The chat as the template renders it, of which the assistant's turns are learned (the `last` alone).

    UserError where the template does not let them be told apart.
    """
    turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        raise UserError("the chat has no turn of the assistant to learn from")
    if turns[0] == 0:
        raise UserError("the chat begins with the assistant's turn; put the turn that it answers before it")
    if MARKED.search(str(tokenizer.chat_template or "")):
        tokens, spans = _marked(tokenizer, messages, now)
        return Labelled(tokens, spans[-1:] if last else spans)
    text = render(tokenizer, messages, answer=False, now=now)
    ranges = [_said(tokenizer, messages, turn, text, now) for turn in (turns[-1:] if last else turns)]
    return _inside(tokenizer, text, ranges)


def _marked(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], now: datetime | None
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Tokens, and spans between the template's own marks."""
    render(tokenizer, messages, answer=False, now=now)  # which ends a template that computes without end
    template = None if now is None else at(str(tokenizer.get_chat_template()), now)
    with foreign("the chat template refuses a chat"):
        found: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    tokens, mask = list(found["input_ids"]), list(found["assistant_masks"])
    spans: list[Span] = []
    place = 0
    for learned, group in groupby(mask):
        length = len(list(group))
        if learned:
            spans.append((place, place + length))
        place += length
    if not spans:
        raise UserError("the chat template's {% generation %} marks none of this chat; mend the template")
    return tuple(tokens), tuple(spans)


def _said(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    turn: int,
    text: str,
    now: datetime | None,
) -> Span:
    """Characters of `text`, the whole chat, that the assistant says in a turn, with what ends it.

    They lie between the chat before with the turn opened and the chat up to the turn; both must begin `text`.
    White space behind the end is the template's.
    """
    opened = render(tokenizer, messages[:turn], now=now)
    whole = turn + 1 == len(messages)
    closed = text if whole else render(tokenizer, messages[: turn + 1], answer=False, now=now)
    closed = closed.rstrip()
    said = messages[turn]["content"].strip()
    if text.startswith(opened) and text.startswith(closed) and said in closed[len(opened) :]:
        return len(opened), len(closed)
    raise UserError(
        f"the chat template writes turn {turn + 1}, the assistant's, otherwise than it opens it or than it"
        " ends a chat, so its tokens cannot be told apart; give a template with {% generation %}, or set"
        " data.learn to last"
    )


def _inside(tokenizer: Tokenizer, text: str, ranges: Sequence[Span]) -> Labelled:
    """The tokens of a text, and spans of those that lie in ranges of characters; one across a border is the
    template's."""
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer does not say where its tokens stand in a text: without {% generation %} in its"
            " template, learning from chats needs a fast one (tokenizer.json)"
        )
    with foreign("the tokenizer refuses a text"):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, offsets = [], found["offset_mapping"]
    for low, high in ranges:
        inside = [i for i, (a, b) in enumerate(offsets) if low <= a and b <= high and a < high]
        spans.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return Labelled(tuple(found["input_ids"]), _kept(spans))


def _kept(spans: Sequence[Span]) -> tuple[Span, ...]:
    kept = tuple((start, stop) for start, stop in spans if max(1, start) < stop)
    if not kept:
        raise EmptyRow("there is no token to learn: the answer is empty")
    return kept
