"""What a run that shall go on was: its header, and what the processes that went on with it said."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle.runlog.reader import valid_lines
from puzzle.runlog.record import Line
from puzzle.runlog.records import End, Resume, RunHeader


@dataclass(frozen=True)
class Past:
    """A run's log so far. `config` and `given` are those of the last process that wrote it; `given` is what
    the user gave, without defaults, None in logs that do not say."""

    run: RunHeader
    config: Mapping[str, Any]
    given: Mapping[str, Any] | None
    completed: bool


def read_lines(log: Path) -> list[Line]:
    """The readable lines of a log, in order; none where there is no log. Raises OSError."""
    # What cannot be read is reported by readers: a writer only goes on behind it.
    return valid_lines(log.read_bytes(), []) if log.is_file() else []


def past_of(lines: Iterable[Line]) -> Past | None:
    """The run that lines tell of; None without a header."""
    records = [line.record for line in lines]
    run = next((record for record in records if isinstance(record, RunHeader)), None)
    if run is None:
        return None
    resume = next((one for one in reversed(records) if isinstance(one, Resume | RunHeader)), None)
    changed = (resume.changed if isinstance(resume, Resume) else None) or {}
    last = next((one for one in reversed(records) if isinstance(one, End | Resume)), None)
    completed = isinstance(last, End) and last.status == "completed"
    return Past(run, changed.get("config", run.config), changed.get("given", run.given), completed)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that both have and that differ, by dotted key: (before, now).

    A change that roles take over from the section above is one change.
    """
    found = _flat_differences(before, now, "")
    return {key: change for key, change in found.items() if found.get(_above(key)) != change}


def _flat_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= _flat_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found[prefix + name] = (old, new)
    return dict(sorted(found.items()))


def _above(key: str) -> str:
    """The key from which a role's own takes its value where it is not given."""
    section, _, rest = key.partition(".")
    if rest.startswith("layout."):
        return f"actor.{rest}" if section == "generation" else rest
    taken_over = section in ("critic", "reference") and rest.startswith(("model", "init"))
    return f"actor.{rest}" if taken_over else ""
