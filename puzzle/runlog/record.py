"""One line of `run.jsonl`: a record of some kind, checked by the annotations of its class, and a checksum."""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard, get_args, get_type_hints

_CHECKSUM = re.compile(r',"crc":"([0-9a-f]{8})"\}$')


class BadLine(ValueError):
    """A line that holds no valid record; the message says why, for a report."""


def is_number(value: object) -> TypeGuard[float]:
    """A finite real number; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: object) -> TypeGuard[int]:
    """A whole number >= 0 that fits into 63 bits; booleans are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class Form(NamedTuple):
    """How a field stands in a line, given in its annotation, `Annotated[int, Form(...)]`: what its JSON value
    must be, in words and as a check, and how it is read and written."""

    must: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


class _Field(NamedTuple):
    form: Form
    null: bool
    default: Any

    @property
    def optional(self) -> bool:
        return self.default is None or self.default == {}


@dataclass(frozen=True)
class Record:
    """What all kinds have. A subclass is a kind, `class Switch(Record, kind="switch")`, and a dataclass.

    A field whose default is None or {} may be missing from a line, and is left out where it has its default.
    `fields` are those of a line that the class does not know: they are allowed and kept.
    """

    kinds: ClassVar[dict[str, type["Record"]]] = {}
    record: ClassVar[str]
    fields: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, kind: str | None = None) -> None:
        if kind is not None:
            cls.record = kind
            Record.kinds[kind] = cls

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        own = ((name, getattr(self, name), one) for name, one in shape(type(self)).items())
        kept = {
            name: None if value is None else one.form.write(value)
            for name, value, one in own
            if not (one.optional and value == one.default)
        }
        return {**kept, **self.fields}

    def flaw(self) -> str | None:
        """What is wrong with fields that are right one by one; None where nothing is."""
        return None

    def for_people(self) -> str | None:
        """Its line in `run.log`; None where it has none."""
        return None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The record of these fields. Raises ValueError where they break the schema."""
        known = shape(cls)
        for name, one in known.items():
            if name not in values:
                if not one.optional:
                    raise ValueError(f"{cls.record} lacks {name}")
            elif not (one.null and values[name] is None) and not one.form.fits(values[name]):
                raise ValueError(f"{name} of {cls.record} must {one.form.must}")
        own: dict[str, Any] = {
            name: None if values[name] is None else one.form.read(values[name])
            for name, one in known.items()
            if name in values
        }
        made = cls(**own, fields={name: value for name, value in values.items() if name not in known})
        if (what := made.flaw()) is not None:
            raise ValueError(what)
        return made


@cache
def shape(kind: type[Record]) -> Mapping[str, _Field]:
    """The fields of a kind, in the order of a line. Raises TypeError where an annotation has no form."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for one in (one for one in fields(kind) if one.name != "fields"):
        members = (hints[one.name], *get_args(hints[one.name]))  # of `Annotated[...] | None`
        forms = [form for member in members for form in getattr(member, "__metadata__", ())]
        if not forms or not isinstance(forms[0], Form):
            raise TypeError(f"{kind.__name__}.{one.name}: annotate it with a Form")
        default = {} if one.default_factory is dict else one.default
        found[one.name] = _Field(forms[0], NoneType in members, default)
    return found


class Line(NamedTuple):
    """A record with its place in the run, when it was written (seconds since 1970; None: not told), and the
    number of its line in the file, from 1."""

    seq: int
    record: Record
    time: float | None = None
    number: int = 0


def seal(values: Mapping[str, Any]) -> str:
    """One line without its newline: compact JSON, the checksum of what stands before it last.

    Raises ValueError at NaN or an infinity, TypeError at a value that JSON has no form for.
    """
    body = json.dumps(values, allow_nan=False, separators=(",", ":"))[:-1]  # in ASCII
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}'


def encode(line: Line) -> str:
    """A line's text without its newline. Raises as `seal`, and ValueError where it breaks the schema."""
    values = line.record.from_json(line.record.to_json()).to_json()  # as it will be read: 1 s is 1.0 s
    time = {} if line.time is None else {"time": line.time}
    return seal({"record": line.record.record, "seq": line.seq, **time, **values})


def decode(line: bytes, number: int = 0) -> Line:
    """What one line says, checked; a line may lack the checksum, but not contradict it.

    Raises:
        BadLine: the line holds no valid record.
    """
    try:
        text = line.decode().strip()
        values = json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadLine("not text") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(str(error) if isinstance(error, BadLine) else "torn or damaged: not JSON") from None
    if not isinstance(values, dict):
        raise BadLine("not a JSON object")
    if "crc" in values:
        found = _CHECKSUM.search(text)
        if found is None or zlib.crc32(text[: found.start()].encode()) != int(found[1], 16):
            raise BadLine("damaged: the checksum does not fit")
        del values["crc"]
    kind, seq, time = (values.pop(name, None) for name in ("record", "seq", "time"))
    if not isinstance(kind, str) or kind not in Record.kinds:
        raise BadLine(f"record {kind!r} is not one of {', '.join(Record.kinds)}")
    if not is_count(seq):
        raise BadLine(f"seq of {kind} must be a whole number >= 0")
    try:
        return Line(seq, Record.kinds[kind].from_json(values), time, number)
    except ValueError as error:
        raise BadLine(str(error)) from None


def _no_constant(name: str) -> float:
    raise BadLine(f"{name} is no JSON number")
