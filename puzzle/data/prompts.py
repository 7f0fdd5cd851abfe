"""Prompts: read from files, turned into tokens, and dealt out in an order that a seed and a step fix."""

import codecs
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.config.sections import DataConfig
from puzzle.data.tokenizers import Tokenizer, answer_lead, encode, render
from puzzle.errors import UserError, describe, fetching
from puzzle.files.jsonio import Fields, parse, shown

_BROKEN = re.compile("[\ud800-\udfff]")

Messages = tuple[Mapping[str, str], ...]
Choose = Callable[[Collection[str], str], Collection[str]]
"""Which columns of a source travel with its prompts: (all their names, the source) -> those to keep. It may
raise UserError."""
Narrow = Callable[[Collection[str], str], list[str]]
Records = Iterator[tuple[str, Mapping[str, Any]]]
"""Place and fields of each row."""


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
            if isinstance(text, str) and (broken := _BROKEN.search(text)):
                at = f"{broken[0]!a} at character {broken.start() + 1}"
                raise UserError(f"{self.place}: {at} is no character that UTF-8 can hold; mend the text")


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
    """The usable prompts of a file, in file order; `dropped` were too long."""

    prompts: tuple[Prompt, ...]
    dropped: int

    @property
    def digest(self) -> str:
        """Changes with any prompt's position, id or tokens."""
        lines = (f"{p.index} {p.id} {' '.join(map(str, p.tokens))}\n" for p in self.prompts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(
    path: Path, prompt_field: str, id_field: str | None, choose: Choose = no_columns
) -> list[PromptRow]:
    """The rows of a .jsonl, .parquet or .txt file or of a Hugging Face dataset folder, in order, with the
    columns that `choose` takes; others are not kept, and of parquet and datasets not read.

    Raises UserError naming file and line for what cannot be read, has no `prompt_field` or lacks a chosen
    column, or has nothing in it, and what `choose` raises.
    """
    chosen: list[str] = []

    def narrow(names: Collection[str], place: str) -> list[str]:
        """What is read of rows with `names`, the first one's at `place`."""
        needed = [prompt_field, *([] if id_field is None else [id_field])]
        _require(needed, names, place)
        chosen[:] = choose(names, str(path))
        return list(dict.fromkeys([*needed, *chosen]))

    rows: list[PromptRow] = []
    seen: dict[str, str] = {}
    for place, record in _records(path, prompt_field, narrow):
        _require(filter(None, (prompt_field, id_field, *chosen)), record, place)
        if id_field is not None and record[id_field] is None:
            raise UserError(
                f"{place}: {id_field} is null; every prompt needs an id, or leave data.id_field out"
            )
        own = None if id_field is None else str(record[id_field])
        if own is not None and own in seen:
            raise UserError(f"{place}: {id_field} {own!r} is taken by {seen[own]}; ids must differ")
        if own is not None:
            seen[own] = place
        if isinstance(record[prompt_field], str) and not record[prompt_field].strip():
            raise UserError(f"{place}: the prompt is empty")
        columns = {name: record[name] for name in chosen}
        rows.append(PromptRow(place, own, record[prompt_field], columns))
    if not rows:
        raise UserError(f"{path}: holds no prompts")
    return rows


def _require(needed: Iterable[str], names: Collection[str], place: str) -> None:
    for name in needed:
        if name not in names:
            raise UserError(f"{place}: no field {name!r}; it has {', '.join(map(str, names)) or 'none'}")


def _records(path: Path, prompt_field: str, narrow: Narrow) -> Records:
    """Place and fields of each row; `narrow` is called once, before or with the first one."""
    if not path.exists():
        raise UserError(f"{path}: no such file{fetching(path, 'dataset')}")
    if path.is_dir():
        return _dataset_folder(path, narrow)
    if path.suffix == ".parquet":
        return _parquet(path, narrow)
    if path.suffix in (".jsonl", ".json"):
        return _narrowed(_json_records(path), narrow)
    if path.suffix in (".txt", ".text"):
        texts = lines(_content(path))
        return _narrowed(((f"{path}:{number}", {prompt_field: line}) for number, line in texts), narrow)
    raise UserError(f"{path}: prompts must be .jsonl, .parquet, .txt or a Hugging Face dataset folder")


def _narrowed(records: Records, narrow: Narrow) -> Records:
    first = True
    for place, record in records:
        if first:
            narrow(record.keys(), place)
        first = False
        yield place, record


def _content(path: Path) -> str:
    """The text of a file, as `decoded` gives it; UserError for a file that cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: is no regular file")  # a pipe would be waited for without end
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(describe(error)) from None


def decoded(data: bytes, source: str) -> str:
    """The text in `data` without its byte order mark; UserError naming the line for what is not UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{source}: is UTF-16 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: not UTF-8 text: {error.reason}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{source}:{line}: holds a NUL character; save it as UTF-8 text")
    return text


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The non-blank lines and their numbers."""
    # Not str.splitlines: it also ends lines at characters that texts may hold.
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line


def _json_records(path: Path) -> Records:
    """The objects of a file with one in every line; a .json file may be an array of them."""
    text = _content(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        found = ((f"{path} row {i}", record) for i, record in enumerate(parse(text, str(path))))
    else:
        found = ((f"{path}:{i}", parse(line, f"{path}:{i}")) for i, line in lines(text))
    for place, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected a JSON object, found {type(record).__name__}")
        yield place, record


def _parquet(path: Path, narrow: Narrow) -> Records:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs the package pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = narrow(file.schema_arrow.names, f"{path} row 0")
            for batch in file.iter_batches(columns=names):
                for record in batch.to_pylist():
                    yield f"{path} row {number}", record
                    number += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _dataset_folder(path: Path, narrow: Narrow) -> Records:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: holds splits; name one of its folders: {splits}")
    if not (path / "dataset_info.json").exists():
        raise UserError(f"{path}: no dataset_info.json in it; it is not a saved Hugging Face dataset")
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise UserError(f"{path}: reading a Hugging Face dataset needs the package datasets") from None
    try:
        found = load_from_disk(str(path))
        assert isinstance(found, Dataset), "splits were refused"
        for number, record in enumerate(found.select_columns(narrow(found.column_names, f"{path} row 0"))):
            yield f"{path} row {number}", record
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable dataset: {str(error).splitlines()[0]}") from None


def load_prompts(
    path: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    now: datetime | None = None,
    choose: Choose = no_columns,
) -> PromptSet:
    """Read and tokenise the prompts of `path`, with the columns that `choose` takes; raises UserError naming
    the place of what is wrong."""
    return tokenise(read_rows(path, data.field, data.id_field, choose), str(path), data, tokenizer, now)


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
    dropped = 0
    lead: str | None = None
    for index, row in enumerate(rows):
        messages = _messages(row, data)
        try:
            if messages is None:
                text, tokens = row.value, encode(tokenizer, row.value)
            else:
                rendered, tokens = render(tokenizer, messages, now=now)
                _check_rendered(messages, rendered)
                text = row.value if isinstance(row.value, str) else rendered
                lead = answer_lead(tokenizer, messages, now) if lead is None else lead
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
        own = row.id or str(index)
        kept.append(Prompt(index, own, text, messages, tuple(tokens), lead or "", row.columns))
    if not kept:
        raise UserError(
            f"{source}: all {dropped} prompts exceed data.max_prompt_tokens {data.max_prompt_tokens}"
        )
    return PromptSet(tuple(kept), dropped)


def _messages(row: PromptRow, data: DataConfig) -> Messages | None:
    """The turns of a row, with the run's system turn unless it has its own; None for plain text."""
    value = row.value
    if isinstance(value, str) and not data.chat_template:
        return None
    listed: Any = [{"role": "user", "content": value}] if isinstance(value, str) else value
    turns = isinstance(listed, Sequence) and bool(listed) and all(isinstance(t, Mapping) for t in listed)
    if not turns or not all(
        isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in listed
    ):
        raise UserError(f"{row.place}: {data.field} must be text or turns with role and content")
    if not data.chat_template:
        raise UserError(f"{row.place}: {data.field} is a chat; set data.chat_template")
    for number, turn in enumerate(listed, 1):
        if turn["role"] == "user" and not turn["content"].strip():
            raise UserError(f"{row.place}: turn {number}, the user's, is empty")
    if listed[-1]["role"] == "assistant":
        raise UserError(
            f"{row.place}: {data.field} ends with the assistant's turn, so there is nothing to answer; "
            "leave that turn out"
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
