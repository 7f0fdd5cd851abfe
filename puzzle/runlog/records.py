"""The schema of `run.jsonl`, one JSON object per line; docs/log-schema.md tells it for people."""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeGuard

from puzzle.files.limits import MOST_NAME
from puzzle.runlog.run import PROVENANCES, STAGES, RunHeader

SCHEMA = 1
# Stages add up to the end-to-end time within this share of it: published logs print ms with 3 decimals.
SUM_TOLERANCE = 1e-6
# Longer than any run; keeps sums of damaged numbers finite.
MOST_SECONDS = 1e9

_CHECKSUM = re.compile(r',"crc":"([0-9a-f]{8})"\}$')

Check = Callable[[Any], str | None]


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


def _schema(value: object) -> str | None:
    return None if value == SCHEMA else f"must be {SCHEMA}, the version known here"


def _text(value: object) -> str | None:
    return None if isinstance(value, str) and value else "must be a non-empty text"


def _name(value: object) -> str | None:
    good = isinstance(value, str) and 0 < len(value) <= MOST_NAME
    return None if good else f"must be a text of 1 to {MOST_NAME} characters"


def _name_or_null(value: object) -> str | None:
    return None if value is None else _name(value)


def _text_or_null(value: object) -> str | None:
    return None if value is None or isinstance(value, str) else "must be a text or null"


def _count(value: object) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return None if good else "must be a whole number >= 0"


def _seconds(value: object) -> str | None:
    return None if is_number(value) and 0 <= value <= MOST_SECONDS else "must be seconds >= 0"


def _number(value: object) -> str | None:
    return None if is_number(value) else "must be a finite number"


def _mapping(value: object) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


def _mapping_or_null(value: object) -> str | None:
    return None if value is None or isinstance(value, dict) else "must be an object or null"


def _texts(value: object) -> str | None:
    good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return None if good else "must be a list of texts"


def _numbers(value: object) -> str | None:
    good = isinstance(value, list) and all(is_number(item) for item in value)
    return None if good else "must be a list of finite numbers"


def _counts(value: object) -> str | None:
    good = isinstance(value, dict) and all(_count(item) is None for item in value.values())
    return None if good else "must map names to whole numbers >= 0"


def _metrics(value: object) -> str | None:
    good = isinstance(value, dict) and all(item is None or is_number(item) for item in value.values())
    return None if good else "must map names to finite numbers or null"


def _stage_seconds(value: object) -> str | None:
    if not isinstance(value, dict) or set(value) != set(STAGES):
        return f"must have exactly the keys {', '.join(STAGES)}"
    for name, seconds in value.items():
        # What is left over may be a little negative where a log's own stage times exceed its end-to-end time.
        least = -MOST_SECONDS if name == "other" else 0
        if not is_number(seconds) or not least <= seconds <= MOST_SECONDS:
            return f"{name} must be seconds >= 0"
    return None


def _provenance(value: object) -> str | None:
    return None if value in PROVENANCES else f"must be one of {', '.join(PROVENANCES)}"


# Per kind of record: fields it must have, then fields that it may have. More fields are allowed and kept.
FIELDS: Mapping[str, tuple[Mapping[str, Check], Mapping[str, Check]]] = {
    "run": (
        {
            "schema": _schema,
            "run_id": _name,
            "repeat": _count,
            "figures": _texts,
            "cluster": _name,
            "variant": _name,
            "actor": _name,
            "critic": _name_or_null,
            "config": _mapping,
            "layouts": _mapping,
            "provenance": _provenance,
            "software": _mapping,
            "hardware": _mapping,
            "git_commit": _text_or_null,
            "started": _text_or_null,
        },
        {"log": _mapping, "plan": _mapping, "given": _mapping_or_null},
    ),
    "rank": ({"rank": _count}, {"coordinates": _mapping, "parameter_bytes": _count, "device": _text,
                                "collective_bytes": _counts, "peak_bytes": _counts, "device_bytes": _counts}),
    "stage": ({"name": _text, "schedule": _text, "hash": _text}, {"actions": _counts, "flushes": _count,
                                                                  "bubble_share": _number}),
    "iteration": ({"iteration": _count, "stage_seconds": _stage_seconds, "e2e_seconds": _seconds,
                   "metrics": _metrics}, {}),
    "evaluation": ({"iteration": _count, "metrics": _metrics}, {}),
    "switch": ({"iteration": _count, "seconds": _seconds}, {}),
    "simulation": ({"iteration": _count, "stage": _text, "seconds": _metrics}, {}),
    "offload": ({"iteration": _count, "seconds": _seconds}, {"copy_seconds": _seconds, "bytes": _count}),
    "checkpoint": ({"iteration": _count, "path": _text}, {"seconds": _seconds, "bytes": _count}),
    "resume": ({"iteration": _count}, {"checkpoint": _text_or_null, "changed": _mapping}),
    "warning": ({"text": _text}, {"iteration": _count}),
    "trace": ({"path": _text}, {"iteration": _count}),
    "note": ({"kind": _text, "text": _text}, {"series": _texts, "indices": _numbers, "seconds": _number,
                                              "values": _numbers}),
    "printed": ({"name": _text, "unit": _text, "values": _numbers}, {}),
    "end": ({"status": _text}, {"text": _text}),
}  # fmt: skip


def of_header(header: RunHeader) -> dict[str, Any]:
    """The `run` record of a header, still without `seq`."""
    named = {field.name: getattr(header, field.name) for field in fields(RunHeader)}
    if not named["plan"]:
        del named["plan"]  # transcribed logs have none
    return {"record": "run", "schema": SCHEMA, **named, "figures": list(header.figures)}


def problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record as a value, or None."""
    kind = record.get("record")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"record {kind!r} is not one of {', '.join(FIELDS)}"
    if (what := _count(record.get("seq"))) is not None:
        return f"seq of {kind} {what}"
    needed, allowed = FIELDS[kind]
    for name, check in needed.items():
        if name not in record:
            return f"{kind} lacks {name}"
        if (what := check(record[name])) is not None:
            return f"{name} of {kind} {what}"
    for name, check in allowed.items():
        if name in record and (what := check(record[name])) is not None:
            return f"{name} of {kind} {what}"
    if kind == "iteration":
        return sum_problem(record["stage_seconds"], record["e2e_seconds"])
    return None


def sum_problem(stage_seconds: Mapping[str, float], e2e_seconds: float) -> str | None:
    """Stages exclude each other and add up to the end-to-end time, within SUM_TOLERANCE of it."""
    total = math.fsum(stage_seconds.values())
    if abs(total - e2e_seconds) <= SUM_TOLERANCE * e2e_seconds:
        return None
    return f"stage_seconds add up to {total:.6f} s, e2e_seconds is {e2e_seconds:.6f} s"


def encode(record: Mapping[str, Any]) -> str:
    """One line without its newline: compact JSON, the checksum of what stands before it last.

    Raises:
        ValueError: the record breaks the schema, or holds NaN or an infinity.
        TypeError: a value that JSON has no form for.
    """
    if (what := problem(record)) is not None:
        raise ValueError(what)
    body = json.dumps(record, allow_nan=False, separators=(",", ":"), ensure_ascii=True)[:-1]
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}'


def decode(line: bytes) -> dict[str, Any]:
    """The record of one line, checked; a line may lack the checksum, but not contradict it.

    Raises:
        BadLine: the line holds no valid record.
    """
    try:
        text = line.decode().strip()
        record = json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadLine("not text") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(str(error) if isinstance(error, BadLine) else "torn or damaged: not JSON") from None
    if not isinstance(record, dict):
        raise BadLine("not a JSON object")
    if "crc" in record:
        found = _CHECKSUM.search(text)
        if found is None or zlib.crc32(text[: found.start()].encode()) != int(found[1], 16):
            raise BadLine("damaged: the checksum does not fit")
        del record["crc"]
    if (what := problem(record)) is not None:
        raise BadLine(what)
    return record


def _no_constant(name: str) -> float:
    raise BadLine(f"{name} is no JSON number")
