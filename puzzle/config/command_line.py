"""`--section.key VALUE` to nested values; JSON in them is read as that of files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from puzzle.config.document import shown
from puzzle.config.renamed import RENAMED, present
from puzzle.errors import UserError
from puzzle.files.jsonio import RepeatedKey, parse

NULL = "null"
_MARKS = frozenset('[]{}"')
"""Without them a list's value is names between commas."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def read(words: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """The nested values of a command line whose options are `known`: by name, each with its annotation.

    A section takes a JSON object, whose keys lie over what was said before; a list takes JSON or names
    between commas, and goes on with what was said before; `null` stands for None, all else is text, which
    validation reads. UserError for an option without a value, a word without an option, and what cannot
    be read.
    """
    found: dict[str, Any] = {}
    for option, value in options(words):
        name = option.removeprefix("--")
        if not option:
            raise UserError(f"unrecognized arguments: {value}")
        kind = known[name]
        if section(kind) is not None:
            read_as: Any = _object(option, value or "", section(kind))
        elif value is None:
            raise UserError(f"argument {option}: expected one argument")
        elif value == NULL:
            read_as = None
        elif (items := _items(kind)) is None:
            read_as = value
        else:
            read_as = [*_listed(found, name.split(".")), *_list(option, value, str in items)]
        _put(found, name.split("."), read_as)
    return found


def section(annotation: Any) -> type[BaseModel] | None:
    """The keys that a value of this annotation has; None where it has none."""
    if get_origin(annotation) is tuple:
        return None  # a list of sections is a value
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line, each with its value, which may be a word of its own; None: it lacks. A
    word that is no option's value has the option ""."""
    waiting = ""
    for word in words:
        if not word.startswith("--"):
            yield waiting, word
            waiting = ""
            continue
        if waiting:
            yield waiting, None
        option, equals, value = word.partition("=")
        waiting = "" if equals else option
        if equals:
            yield option, value
    if waiting:
        yield waiting, None


def under_present_names(words: Sequence[str]) -> list[str]:
    """The words of a command line with options and their values renamed; a note for each."""
    renewed, said = list(words), set()
    for place, word in enumerate(renewed):
        name, equals, value = word.removeprefix("--").partition("=")
        key = tuple(name.split("."))
        renamed = next((r for r in RENAMED if key[: len(r.old)] == r.old), None)
        if not word.startswith("--") or renamed is None:
            continue
        renewed[place] = f"--{'.'.join(present(key))}{equals}{renamed.values.get(value, value)}"
        if not equals and place + 1 < len(renewed):
            value = renewed[place + 1]
            renewed[place + 1] = renamed.values.get(value, value)
        if value not in renamed.usual:
            said.add(str(renamed))
    for text in sorted(said):
        print(f"note: the command line: {text}", file=sys.stderr)
    return renewed


def _listed(values: Any, key: Sequence[str]) -> list[Any]:
    """What stands at a key, if it is a list."""
    for name in key:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, list) else []


def _put(values: dict[str, Any], key: Sequence[str], value: Any) -> None:
    """Lay a value over `values` at a key: an object over an object key by key."""
    *parents, last = key
    for name in parents:
        inner = values.get(name)
        values[name] = values = inner if isinstance(inner, dict) else {}
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        for name, inner in value.items():
            _put(values[last], [name], inner)
    else:
        values[last] = value


def _items(annotation: Any) -> tuple[Any, ...] | None:
    """What the items of a list are, None where a value is none."""
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is tuple:
            return get_args(candidate)
    return None


def _object(option: str, value: str, kind: type[BaseModel] | None) -> dict[str, Any] | None:
    """The value of a section: an object, or null."""
    if value == NULL:
        return None
    try:
        found = parse(value, option)
        if isinstance(found, dict):
            return found
    except RepeatedKey:
        raise
    except UserError:
        pass
    assert kind is not None, "a section"
    inner = next(iter(kind.model_fields))
    raise UserError(
        f"{option} {shown(value)}: a section of keys; give one as {option}.{inner} VALUE, or JSON such as"
        f' {{"{inner}": VALUE}}'
    )


def _list(option: str, value: str, of_text: bool) -> list[Any]:
    """The items of a list: a JSON array, or what stands in one, or names between commas."""
    text = value.strip()
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _MARKS.isdisjoint(inside):
        if inside is not text and not inside.strip():
            return []
        names = [name.strip() for name in inside.split(",")]
        return [parse(name, option) if not of_text and _NUMBER.fullmatch(name) else name for name in names]
    try:
        return parse(f"[{inside}]", option)
    except RepeatedKey:
        raise
    except UserError:
        raise UserError(f"{option} {shown(value)}: neither JSON nor names between commas") from None
