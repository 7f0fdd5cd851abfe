"""Examples of supervised training: read from files, turned into tokens with those that are learned."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle.config.supervised import DialoguesConfig, ExamplesConfig, PairsConfig
from puzzle.data.masks import Labelled, label_chat, label_text
from puzzle.data.records import EmptyRow, records, refuse_broken, require
from puzzle.data.stream import NONE_LEFT_OUT, LeftOut, Stream
from puzzle.data.tokenizers import Tokenizer
from puzzle.errors import UserError
from puzzle.files.jsonio import shown
from puzzle.files.limits import LARGEST

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One row of the data: `index` is its position in the file, `sequences` are what a loss learns: one, or a
    pair of which the first was preferred, by `margin`. `reference` are sums of what a reference says of the
    learned tokens of each, where a loss needs them."""

    index: int
    sequences: tuple[Labelled, ...]
    margin: float
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Tokens of all its sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class ExampleSet:
    """The usable examples of a file, in file order, and those that are left out."""

    examples: tuple[Example, ...]
    left: LeftOut = NONE_LEFT_OUT

    @property
    def remarks(self) -> list[str]:
        """What people should know of those that are left out."""
        return self.left.remarks(len(self.examples), "examples")

    @cached_property
    def digest(self) -> str:
        """Changes with any example's position, tokens or spans."""
        found = hashlib.sha256()
        for example in self.examples:
            found.update(repr((example.index, example.sequences, example.margin)).encode())
        return found.hexdigest()

    def stream(self, batch: int, seed: int, shuffle: bool) -> Stream[Example]:
        """Deals batches. UserError if there are fewer examples than a batch needs."""
        return Stream(self.examples, self.digest, batch, seed, shuffle, "examples")


def load_examples(
    path: Path, data: ExamplesConfig, tokenizer: Tokenizer, now: datetime | None = None
) -> ExampleSet:
    """Read and tokenise the examples of `path`; UserError naming the place of what is wrong. `now` is the
    time that chat templates write."""
    kept, long, empty = [], list[str](), list[str]()
    for index, (place, record) in enumerate(read_examples(path, data)):
        try:
            sequences = sequences_of(record, data, tokenizer, now)
            margin = margin_of(record, data)
        except EmptyRow as error:
            if data.empty == "refuse":
                raise EmptyRow(f"{place}: {error}") from None
            empty.append(place)
            continue
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        longest = max(map(len, sequences))
        if longest <= data.max_tokens:
            kept.append(Example(index, sequences, margin))
            continue
        if data.too_long == "refuse":
            raise UserError(
                f"{place}: the example has {longest} tokens, data.max_tokens is {data.max_tokens}; raise it,"
                " or set data.too_long to drop"
            )
        long.append(place)
    left = LeftOut("data.max_tokens", tuple(long), tuple(empty))
    if not kept:
        raise UserError(f"{path}: {left.all_of_them('examples', data.max_tokens)}")
    return ExampleSet(tuple(kept), left)


def read_examples(path: Path, data: ExamplesConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """Place and wanted fields of every row. UserError for what cannot be read or lacks a field."""
    wanted: list[str] = []

    def narrow(names: Collection[str], place: str) -> list[str]:
        wanted[:] = fields_of(names, data)
        require(wanted, names, place)
        return wanted

    if path.suffix in (".txt", ".text"):
        raise UserError(f"{path}: examples must be .jsonl, .parquet or a Hugging Face dataset folder")
    found = []
    for place, record in records(path, data.prompt_field, narrow, "examples"):
        require(wanted, record, place)
        found.append((place, {name: record[name] for name in wanted}))
    if not found:
        raise UserError(f"{path}: holds no examples")
    return found


def fields_of(names: Collection[str], data: ExamplesConfig) -> list[str]:
    """Which fields of a file's rows are read, whose first row has these."""
    if isinstance(data, PairsConfig):
        # Answers may be whole chats, which need no prompt.
        asked = [data.prompt_field] if data.prompt_field in names else []
        margin = [] if data.margin_field is None else [data.margin_field]
        return [*asked, data.chosen_field, data.rejected_field, *margin]
    assert isinstance(data, DialoguesConfig), "the other kind of examples"
    if data.messages_field in names:
        return [data.messages_field]
    return [data.prompt_field, data.response_field]


def sequences_of(
    record: Mapping[str, Any], data: ExamplesConfig, tokenizer: Tokenizer, now: datetime | None
) -> tuple[Labelled, ...]:
    """The sequences of one row. UserError without its place."""
    if isinstance(data, PairsConfig):
        return tuple(
            _judged(record, name, data, tokenizer, now) for name in (data.chosen_field, data.rejected_field)
        )
    assert isinstance(data, DialoguesConfig), "the other kind of examples"
    if data.messages_field in record:
        chat = turns_of(record[data.messages_field], data.messages_field)
        return (_chat(chat, data, tokenizer, data.learn == "last", now),)
    prompt, response = record[data.prompt_field], record[data.response_field]
    last = data.learn == "last" or not isinstance(prompt, str)
    return (answered(prompt, response, data, tokenizer, last, now),)


def margin_of(record: Mapping[str, Any], data: ExamplesConfig) -> float:
    """By how much the first of a pair was preferred; UserError for what is no finite number."""
    if not isinstance(data, PairsConfig) or data.margin_field is None:
        return 0.0
    value = record[data.margin_field]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise UserError(f"{data.margin_field} must be a number, found {shown(value)}")
    return float(value)


def _judged(
    record: Mapping[str, Any], name: str, data: PairsConfig, tokenizer: Tokenizer, now: datetime | None
) -> Labelled:
    """One answer of a pair with what it answers, up to its end, of which the answer is learned.

    A text and turns that begin with the assistant's answer the row's prompt; other turns are a whole chat.
    """
    answer = record[name]
    if isinstance(answer, str):
        if data.prompt_field not in record:
            raise UserError(f"no field {data.prompt_field!r}, which {name} answers")
        return answered(record[data.prompt_field], answer, data, tokenizer, True, now).ended
    turns = turns_of(answer, name, may_end_in_silence=True)
    if turns[0]["role"] == "assistant" and data.prompt_field in record:
        turns = [*_asked(record[data.prompt_field], data.prompt_field), *turns]
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{name} must end with the assistant's turn")
    return _chat(turns, data, tokenizer, True, now).ended


def _asked(prompt: Any, name: str) -> Turns:
    """A prompt as the turns before an answer."""
    return turns_of([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, name)


def answered(
    prompt: Any,
    response: Any,
    data: ExamplesConfig,
    tokenizer: Tokenizer,
    last: bool,
    now: datetime | None,
) -> Labelled:
    """A prompt, text or the turns before, with its response, a text."""
    response = text_of(response, "the response")
    if isinstance(prompt, str) and not data.chat_template:
        return label_text(tokenizer, text_of(prompt, data.prompt_field), response)
    turns = [*_asked(prompt, data.prompt_field), {"role": "assistant", "content": response}]
    return _chat(turns, data, tokenizer, last, now)


def _chat(
    turns: Turns, data: ExamplesConfig, tokenizer: Tokenizer, last: bool, now: datetime | None
) -> Labelled:
    if not data.chat_template:
        raise UserError("the example is a chat; set data.chat_template")
    if data.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": data.system}, *turns]
    return label_chat(tokenizer, turns, last, now)


def text_of(value: Any, name: str) -> str:
    """A text of a row that is not empty; UserError for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise EmptyRow(f"{name} is empty")
    if not isinstance(value, str):
        raise UserError(f"{name} must be text")
    refuse_broken(name, value)
    return value


def turns_of(value: Any, name: str, may_end_in_silence: bool = False) -> Turns:
    """The turns of a chat; UserError for anything else.

    An empty answer would teach to say nothing. Of a pair, it `may_end_in_silence`: one answer is the better
    for saying something.
    """
    if value is None or (isinstance(value, Sequence) and not value):
        raise EmptyRow(f"{name} is empty")
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    turns = [turn for turn in listed if isinstance(turn, Mapping)]
    good = all(isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns)
    if not turns or len(turns) != len(listed) or not good:
        raise UserError(f"{name} must be turns with role and content")
    for number, turn in enumerate(turns, 1):
        refuse_broken(f"{name}: turn {number}", turn["content"])
        silent = may_end_in_silence and number == len(turns) and turn["role"] == "assistant"
        if turn["role"] in ("user", "assistant") and not turn["content"].strip() and not silent:
            raise EmptyRow(f"{name}: turn {number}, the {turn['role']}'s, is empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
