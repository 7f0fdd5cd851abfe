"""Prompts: read from files, turned into tokens, and dealt out in an order that a seed and a step fix."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from puzzle.config.sections import DataConfig
from puzzle.data.records import EmptyRow, records, refuse_broken, require
from puzzle.data.stream import NONE_LEFT_OUT, LeftOut, Stream, generator
from puzzle.data.tokenizers import Tokenizer, answer_lead, bare, encode, render
from puzzle.errors import UserError

Messages = tuple[Mapping[str, str], ...]
Choose = Callable[[Collection[str], str], Collection[str]]
"""Which columns of a source travel with its prompts: (all their names, the source) -> those to keep. It may
raise UserError."""


def no_columns(_names: Collection[str], _source: str) -> Collection[str]:
    """A Choose: prompts travel alone."""
    return ()


@dataclass(frozen=True)
class PromptRow:
    """One prompt as read: `place` is file:line, or file and row, for error lines."""

    place: str
    id: str | None
    value: Any
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UserError for what no UTF-8 text can hold: half of a surrogate pair, or a byte that was none."""
        turns = self.value if isinstance(self.value, Sequence) and not isinstance(self.value, str) else ()
        contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
        for text in (self.id, self.value, *contents):
            if isinstance(text, str):
                refuse_broken(self.place, text)


@dataclass(frozen=True)
class Prompt:
    """One prompt. `index`, its position in the file, keys its sampling noise; `id` names it.

    `messages` are the turns of a chat, None for plain text; `text` is what reward functions and samples show.
    `lead` is what the chat's template puts before an answer (`answer_lead`). `columns` are the chosen fields
    of its row, by name, as the file has them.
    """

    index: int
    id: str
    text: str
    messages: Messages | None
    tokens: tuple[int, ...]
    lead: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a file, in file order, and those that are left out."""

    prompts: tuple[Prompt, ...]
    left: LeftOut = NONE_LEFT_OUT

    @property
    def remarks(self) -> list[str]:
        """What people should know of those that are left out."""
        return self.left.remarks(len(self.prompts), "prompts")

    @property
    def digest(self) -> str:
        """Changes with any prompt's position, id or tokens."""
        lines = (f"{p.index} {p.id} {' '.join(map(str, p.tokens))}\n" for p in self.prompts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(
    path: Path, prompt_field: str, id_field: str | None, choose: Choose = no_columns, empty: bool = False
) -> list[PromptRow]:
    """The rows of a .jsonl, .parquet or .txt file or of a Hugging Face dataset folder, in order, with the
    columns that `choose` takes; others are not kept, and of parquet and datasets not read. `empty`: prompts
    without text are among them.

    Raises UserError naming file and line for what cannot be read, has no `prompt_field` or lacks a chosen
    column, or has nothing in it, and what `choose` raises.
    """
    chosen: list[str] = []

    def narrow(names: Collection[str], place: str) -> list[str]:
        """What is read of rows with `names`, the first one's at `place`."""
        needed = [prompt_field, *([] if id_field is None else [id_field])]
        require(needed, names, place)
        chosen[:] = choose(names, str(path))
        return list(dict.fromkeys([*needed, *chosen]))

    rows: list[PromptRow] = []
    seen: dict[str, str] = {}
    for place, record in records(path, prompt_field, narrow):
        require(filter(None, (prompt_field, id_field, *chosen)), record, place)
        if id_field is not None and record[id_field] is None:
            raise UserError(
                f"{place}: {id_field} is null; every prompt needs an id, or leave data.id_field out"
            )
        own = None if id_field is None else str(record[id_field])
        if own is not None and own in seen:
            raise UserError(f"{place}: {id_field} {own!r} is taken by {seen[own]}; ids must differ")
        if own is not None:
            seen[own] = place
        if not empty:
            _refuse_empty(record[prompt_field], f"{place}: ")
        columns = {name: record[name] for name in chosen}
        rows.append(PromptRow(place, own, record[prompt_field], columns))
    if not rows:
        raise UserError(f"{path}: holds no prompts")
    return rows


def load_prompts(
    path: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    now: datetime | None = None,
    choose: Choose = no_columns,
) -> PromptSet:
    """Read and tokenise the prompts of `path`, with the columns that `choose` takes; raises UserError naming
    the place of what is wrong."""
    rows = read_rows(path, data.field, data.id_field, choose, data.empty == "drop")
    return tokenise(rows, str(path), data, tokenizer, now)


def tokenise(
    rows: Sequence[PromptRow],
    source: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    now: datetime | None = None,
) -> PromptSet:
    """Turn rows into prompts, with `now` where a chat template writes the time; raises UserError naming the
    place of what is wrong."""
    kept: list[Prompt] = []
    long, empty = list[str](), list[str]()
    lead: str | None = None
    for index, row in enumerate(rows):
        try:
            _refuse_empty(row.value)
            messages = _messages(row.value, data)
            if messages is None:
                text, tokens = row.value, encode(tokenizer, row.value)
            else:
                rendered = render(tokenizer, messages, now=now)
                _check_rendered(messages, rendered)
                tokens = bare(tokenizer, rendered)
                text = row.value if isinstance(row.value, str) else rendered
                lead = answer_lead(tokenizer, messages, now) if lead is None else lead
            if not tokens:
                raise EmptyRow("the prompt has no tokens")
        except EmptyRow as error:
            if data.empty == "refuse":
                raise EmptyRow(f"{row.place}: {error}") from None
            empty.append(row.place)
            continue
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None
        if len(tokens) > data.max_prompt_tokens:
            if data.too_long == "refuse":
                raise UserError(
                    f"{row.place}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens is "
                    f"{data.max_prompt_tokens}; raise it, or set data.too_long to drop"
                )
            long.append(row.place)
            continue
        own = row.id or str(index)
        kept.append(Prompt(index, own, text, messages, tuple(tokens), lead or "", row.columns))
    left = LeftOut("data.max_prompt_tokens", tuple(long), tuple(empty))
    if not kept:
        raise UserError(f"{source}: {left.all_of_them('prompts', data.max_prompt_tokens)}")
    return PromptSet(tuple(kept), left)


def _refuse_empty(value: Any, place: str = "") -> None:
    """EmptyRow for a prompt that is a text, or nothing, without any word."""
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        raise EmptyRow(f"{place}the prompt is empty")


def _messages(value: Any, data: DataConfig) -> Messages | None:
    """The turns of a row, with the run's system turn unless it has its own; None for plain text."""
    if isinstance(value, str) and not data.chat_template:
        return None
    listed: Any = [{"role": "user", "content": value}] if isinstance(value, str) else value
    turns = isinstance(listed, Sequence) and bool(listed) and all(isinstance(t, Mapping) for t in listed)
    if not turns or not all(
        isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in listed
    ):
        raise UserError(f"{data.field} must be text or turns with role and content")
    if not data.chat_template:
        raise UserError(f"{data.field} is a chat; set data.chat_template")
    for number, turn in enumerate(listed, 1):
        if turn["role"] == "user" and not turn["content"].strip():
            raise EmptyRow(f"turn {number}, the user's, is empty")
    if listed[-1]["role"] == "assistant":
        raise UserError(
            f"{data.field} ends with the assistant's turn, so there is nothing to answer; leave that turn out"
        )
    own = listed[0]["role"] == "system"
    system = () if data.system is None or own else ({"role": "system", "content": data.system},)
    return (*system, *({"role": turn["role"], "content": turn["content"]} for turn in listed))


def _check_rendered(messages: Messages, rendered: str) -> None:
    """UserError for a turn that the template leaves out; what assistants and tools said it may shorten."""
    for number, turn in enumerate(messages, 1):
        if turn["role"] not in ("assistant", "tool") and turn["content"].strip() not in rendered:
            raise UserError(
                f"the chat template leaves turn {number} out, of role {turn['role']!r}; "
                "use roles that it knows"
            )


def random_prompts(indices: range, length: int, vocab_size: int, seed: int) -> PromptSet:
    """Prompts of `length` uniform token ids, for timing runs; prompt i depends on (seed, i) alone."""

    def tokens(index: int) -> tuple[int, ...]:
        return tuple(generator(seed, index).integers(vocab_size, size=length).tolist())

    return PromptSet(tuple(Prompt(i, str(i), "", None, tokens(i)) for i in indices))


class PromptStream(Stream[Prompt]):
    """Deals batches of prompts."""

    def __init__(self, prompts: PromptSet, batch: int, seed: int, shuffle: bool) -> None:
        """Raises UserError if there are fewer prompts than a batch needs."""
        super().__init__(prompts.prompts, prompts.digest, batch, seed, shuffle, "prompts")
        self.prompts = prompts


class RandomStream(PromptStream):
    """Deals batches of random prompts, in order and without end, so that a run may be resumed for more
    iterations than it began with. `prompts` are those of the first batch."""

    remedy = (
        "give data.random_tokens and the size of the vocabulary as they were; if they are, an earlier"
        " version, which dealt others, wrote the checkpoint: begin a new run in another folder, with its"
        " model as actor.model to keep what it learned"
    )

    def __init__(self, batch: int, length: int, vocab_size: int, seed: int) -> None:
        self.length, self.vocab_size = length, vocab_size
        super().__init__(random_prompts(range(batch), length, vocab_size, seed), batch, seed, False)

    def next(self) -> list[Prompt]:
        start = self.step * self.batch
        self.step += 1
        indices = range(start, start + self.batch)
        return [*random_prompts(indices, self.length, self.vocab_size, self.seed).prompts]
