"""JSON that others wrote: read within limits, its values taken by type.

Every reader of foreign JSON goes through here, so that whatever is wrong with a file is one `UserError` that
names the file, the key, what was found and what may stand there.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

from puzzle.errors import UserError
from puzzle.files.reading import MOST_BYTES, read_text

MOST_DIGITS = 400
"""Longer integers than any double are no quantities; Python would refuse those of 4,300 digits by itself."""

_UNBOUNDED = (1 << 63) - 1
_ABSENT: Any = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_WORDS = {None: "null", True: "true", False: "false"}


class RepeatedKey(UserError):
    """An object says two things under one key: JSON does not tell which of them is meant."""


def parse(text: str | bytes, place: str) -> Any:
    """The value of a JSON text; UserError, beginning with `place`, if it is none, a RepeatedKey where an
    object gives one key two values."""
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except RepeatedKey as error:
        raise RepeatedKey(f"{place}: {error}") from None
    except RecursionError:
        raise UserError(f"{place}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        raise UserError(f"{place}: not valid JSON: {error}") from None


def read(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value of a JSON file; UserError naming it if it is none."""
    return parse(read_text(path, most_bytes), str(path))


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object of a JSON file; UserError naming it if it holds none."""
    found = read(path, most_bytes)
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object, found {shown(found)}")
    return found


def shown(value: Any) -> str:
    """A value for an error line, as JSON has it and cut to a readable length."""
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    return _SHORT.repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these pairs; RepeatedKey, without a place, for a key of two values. Said twice alike, as
    programs do that write the keys 1 and "1", it is said once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if repr(value) != repr(found[key]):  # of equal types too: 1 is not true
                raise RepeatedKey(
                    f"{shown(key)} is given twice, {shown(value)} and {shown(found[key])}; leave one out"
                )
    return found


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


class Fields:
    """The fields of a JSON object, by key and type.

    A key that is left out gives `default`; without one it must be there. `null` is refused, but where
    `nullable` gives None. Every UserError begins with `place`.
    """

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{place}: must be an object, found {shown(values)}")
        self.values: Mapping[str, Any] = values
        self.place = place

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """UserError: `key` must be `wanted`."""
        if key not in self.values:
            raise UserError(f"{self.place}: {key} is missing; it must be {wanted}")
        raise UserError(f"{self.place}: {key} must be {wanted}, found {shown(self.values[key])}")

    @overload
    def integer(
        self,
        key: str,
        default: int = ...,
        *,
        least: int = ...,
        most: int = ...,
        nullable: Literal[False] = ...,
    ) -> int: ...
    @overload
    def integer(
        self, key: str, default: int | None = ..., *, least: int = ..., most: int = ..., nullable: bool
    ) -> int | None: ...
    def integer(
        self,
        key: str,
        default: Any = _ABSENT,
        *,
        least: int = 0,
        most: int = _UNBOUNDED,
        nullable: bool = False,
    ) -> int | None:
        """A whole number in [least, most]; neither true nor 3.0 is one."""
        value = self.values.get(key, default)
        if value is None and nullable:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            bounds = f"of at least {least}" if most == _UNBOUNDED else f"from {least} to {most}"
            self.refuse(key, f"a whole number {bounds}{' or null' * nullable}")
        return value

    def number(
        self,
        key: str,
        default: Any = _ABSENT,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
    ) -> float:
        """A finite number of at least `least`, above `above` and at most `most`."""
        value = self.values.get(key, default)
        number = _finite(value)
        if number is None or not least <= number <= most or number <= above:
            words = ((least, "at least"), (above, "above"), (most, "at most"))
            bounds = [f"{word} {bound:g}" for bound, word in words if math.isfinite(bound)]
            self.refuse(key, " ".join(["a finite number", " and ".join(bounds)]).rstrip())
        return number

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: Any = _ABSENT) -> str:
        """A text."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def texts(self, key: str, default: Any = _ABSENT, nullable: bool = False) -> list[str] | None:
        """A list of texts."""
        value = self.values.get(key, default)
        if value is None and nullable:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, f"a list of texts{' or null' * nullable}")
        return value

    def section(self, key: str) -> Fields:
        """An object."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return Fields(value, f"{self.place}: {key}")

    def optional_section(self, key: str) -> Fields | None:
        """An object; None where it is left out or null."""
        return None if self.values.get(key) is None else self.section(key)

    def sections(self) -> list[tuple[str, Fields]]:
        """All fields, which must be objects."""
        return [(key, self.section(key)) for key in self]

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list):
            self.refuse(key, "a list of objects")
        return [Fields(item, f"{self.place}: {key}[{i}]") for i, item in enumerate(value)]

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none (null, or left out)."""
        value = self.values.get(key)
        found: Sequence[Any] = value if isinstance(value, list) else () if value is None else (value,)
        for item in found:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 1 << 31:
                self.refuse(key, "a token id, a list of them, or null")
        return tuple(found)


def _finite(value: Any) -> float | None:
    """As a float; None for what is no finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
