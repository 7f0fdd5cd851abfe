"""Rows of data files: JSON lines, parquet, text, Hugging Face dataset folders."""

import codecs
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle.errors import UserError, describe, fetching
from puzzle.files.jsonio import parse

_BROKEN = re.compile("[\ud800-\udfff]")

Narrow = Callable[[Collection[str], str], list[str]]
"""What is read of rows with these fields, the first one's at this place."""
Records = Iterator[tuple[str, Mapping[str, Any]]]
"""Place and fields of each row."""


class EmptyRow(UserError):
    """A row that has no text where a text is needed: `data.empty` says what becomes of it."""


@contextmanager
def drop_is_a_remedy() -> Generator[None]:
    """A refusal of an EmptyRow inside tells of `data.empty`, which who reads rows for a configuration has."""
    try:
        yield
    except EmptyRow as error:
        raise UserError(f"{error}; mend it, or set data.empty to drop") from None


def refuse_broken(place: str, text: str) -> None:
    """UserError for what no UTF-8 text can hold: half of a surrogate pair, or a byte that was none."""
    if broken := _BROKEN.search(text):
        at = f"{broken[0]!a} at character {broken.start() + 1}"
        raise UserError(f"{place}: {at} is no character that UTF-8 can hold; mend the text")


def require(needed: Iterable[str], names: Collection[str], place: str) -> None:
    """UserError for the first of the `needed` fields that is not among `names`."""
    for name in needed:
        if name not in names:
            raise UserError(f"{place}: no field {name!r}; it has {', '.join(map(str, names)) or 'none'}")


def records(path: Path, text_field: str, narrow: Narrow, what: str = "prompts") -> Records:
    """Place and fields of each row of `what`; `narrow` is called once, before or with the first one. The
    lines of a text file are fields called `text_field`.

    UserError naming file and line for what cannot be read.
    """
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
        return _narrowed(((f"{path}:{number}", {text_field: line}) for number, line in texts), narrow)
    raise UserError(f"{path}: {what} must be .jsonl, .parquet, .txt or a Hugging Face dataset folder")


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
