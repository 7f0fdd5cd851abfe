"""Prompts: read from files, turned into tokens, and dealt out in an order that a seed and a step fix."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.config import DataConfig
from puzzle.data.tokenizers import Tokenizer, encode, render
from puzzle.errors import UserError, describe
from puzzle.jsonio import Fields, parse, shown

_BROKEN = re.compile("[\ud800-\udfff]")

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Row:
    """One prompt as read: `place` is file:line, or file and row, for error lines."""

    place: str
    id: str | None
    value: Any

    def __post_init__(self) -> None:
        """UserError for what no UTF-8 text can hold: half of a surrogate pair, or a byte that was none."""
        turns = self.value if isinstance(self.value, Sequence) and not isinstance(self.value, str) else ()
        contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
        for text in (self.id, self.value, *contents):
            if isinstance(text, str) and (broken := _BROKEN.search(text)):
                at = f"{broken[0]!a} at character {broken.start() + 1}"
                raise UserError(f"{self.place}: {at} is no character that UTF-8 can hold; mend the text")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `index`, its position in the file, keys its sampling noise; `id` names it.

    `messages` are the turns of a chat, None for plain text; `text` is what reward functions and samples show.
    """

    index: int
    id: str
    text: str
    messages: Messages | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a file, in file order; `dropped` were too long."""

    prompts: tuple[Prompt, ...]
    dropped: int

    @property
    def digest(self) -> str:
        """Changes with any prompt's position, id or tokens."""
        lines = (f"{p.index} {p.id} {' '.join(map(str, p.tokens))}\n" for p in self.prompts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(path: Path, field: str, id_field: str | None) -> list[Row]:
    """The rows of a .jsonl, .parquet or .txt file or of a Hugging Face dataset folder, in order.

    Raises UserError naming file and line for what cannot be read, has no `field`, or has nothing in it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        records = _dataset_folder(path)
    elif path.suffix in (".jsonl", ".json"):
        records = _json_lines(path)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    elif path.suffix in (".txt", ".text"):
        records = ((f"{path}:{number}", {field: line}) for number, line in _lines(path))
    else:
        raise UserError(f"{path}: prompts must be .jsonl, .parquet, .txt or a Hugging Face dataset folder")
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for place, record in records:
        for name in filter(None, (field, id_field)):
            if name not in record:
                raise UserError(f"{place}: no field {name!r}; it has {', '.join(map(str, record)) or 'none'}")
        own = None if id_field is None else str(record[id_field])
        if own is not None and own in seen:
            raise UserError(f"{place}: {id_field} {own!r} is taken by {seen[own]}; ids must differ")
        if own is not None:
            seen[own] = place
        if isinstance(record[field], str) and not record[field].strip():
            raise UserError(f"{place}: the prompt is empty")
        rows.append(Row(place, own, record[field]))
    if not rows:
        raise UserError(f"{path}: holds no prompts")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines and their numbers."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise UserError(describe(error)) from None


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        record = parse(line, f"{path}:{number}")
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        yield f"{path}:{number}", record


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs the package pyarrow") from None
    try:
        records = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    yield from ((f"{path} row {number}", record) for number, record in enumerate(records))


def _dataset_folder(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: holds splits; name one of its folders: {splits}")
    if not (path / "dataset_info.json").exists():
        raise UserError(f"{path}: no dataset_info.json in it; it is not a saved Hugging Face dataset")
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(f"{path}: reading a Hugging Face dataset needs the package datasets") from None
    try:
        records: list[Any] = list(load_from_disk(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable dataset: {str(error).splitlines()[0]}") from None
    yield from ((f"{path} row {number}", record) for number, record in enumerate(records))


def load_prompts(
    path: Path, data: DataConfig, tokenizer: Tokenizer, now: datetime | None = None
) -> PromptSet:
    """Read and tokenise the prompts of `path`; raises UserError naming the place of what is wrong."""
    return tokenise(read_rows(path, data.field, data.id_field), str(path), data, tokenizer, now)


def tokenise(
    rows: Sequence[Row], source: str, data: DataConfig, tokenizer: Tokenizer, now: datetime | None = None
) -> PromptSet:
    """Turn rows into prompts, with `now` where a chat template writes the time; raises UserError naming the
    place of what is wrong."""
    kept: list[Prompt] = []
    dropped = 0
    for index, row in enumerate(rows):
        messages = _messages(row, data)
        try:
            if messages is None:
                text, tokens = row.value, encode(tokenizer, row.value)
            else:
                rendered, tokens = render(tokenizer, messages, now=now)
                text = row.value if isinstance(row.value, str) else rendered
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None
        if not tokens:
            raise UserError(f"{row.place}: the prompt has no tokens")
        if len(tokens) > data.max_prompt_tokens:
            if data.too_long == "refuse":
                raise UserError(
                    f"{row.place}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens is "
                    f"{data.max_prompt_tokens}; raise it, or set data.too_long to drop"
                )
            dropped += 1
            continue
        kept.append(Prompt(index, row.id or str(index), text, messages, tuple(tokens)))
    if not kept:
        raise UserError(
            f"{source}: all {dropped} prompts exceed data.max_prompt_tokens {data.max_prompt_tokens}"
        )
    return PromptSet(tuple(kept), dropped)


def _messages(row: Row, data: DataConfig) -> Messages | None:
    value = row.value
    if isinstance(value, str):
        if not data.chat_template:
            return None
        system = () if data.system is None else ({"role": "system", "content": data.system},)
        return (*system, {"role": "user", "content": value})
    turns = isinstance(value, Sequence) and bool(value) and all(isinstance(turn, Mapping) for turn in value)
    if not turns or not all(
        isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in value
    ):
        raise UserError(f"{row.place}: {data.field} must be text or turns with role and content")
    if not data.chat_template:
        raise UserError(f"{row.place}: {data.field} is a chat; set data.chat_template")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> PromptSet:
    """`count` prompts of `length` uniform token ids, for timing runs; prompt i depends on (seed, i) alone."""

    def tokens(index: int) -> tuple[int, ...]:
        return tuple(_random(seed, index).integers(vocab_size, size=length).tolist())

    return PromptSet(tuple(Prompt(i, str(i), "", None, tokens(i)) for i in range(count)), 0)


def _random(seed: int, counter: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, counter]))


class PromptStream:
    """Deals batches of prompts. A batch depends on the prompts, the seed and its number alone.

    Every epoch has its own order; what is left of an epoch after its last full batch is skipped, so that no
    prompt is twice in a batch.
    """

    def __init__(self, prompts: PromptSet, batch: int, seed: int, shuffle: bool) -> None:
        """Raises UserError if there are fewer prompts than a batch needs."""
        if batch > len(prompts.prompts):
            raise UserError(
                f"batch is {batch} but there are only {len(prompts.prompts)} prompts; lower batch"
            )
        self.prompts = prompts
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.step = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.step // self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return len(self.prompts.prompts) // self.batch

    def next(self) -> list[Prompt]:
        """The next batch, length `batch`."""
        order = np.arange(len(self.prompts.prompts))
        if self.shuffle:
            order = _random(self.seed, self.epoch).permutation(order)
        start = self.step % self._per_epoch * self.batch
        self.step += 1
        return [self.prompts.prompts[i] for i in order[start : start + self.batch]]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"step": self.step, "batch": self.batch, "seed": self.seed, "digest": self.prompts.digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if the prompts or the batch are others."""
        fields = Fields(state, "the checkpoint's state of the data")
        if fields.text("digest") != self.prompts.digest:
            raise UserError("the prompts or their tokens are not those of the checkpoint; restore the file")
        for name in ("batch", "seed"):
            if state.get(name) != getattr(self, name):
                found = shown(state.get(name))
                raise UserError(f"{name} is {getattr(self, name)} but {found} in the checkpoint")
        self.step = fields.integer("step")
