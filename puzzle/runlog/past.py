"""What a run that shall go on was: its header, and what the processes that went on with it said."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle.runlog import records


@dataclass(frozen=True)
class Past:
    """A run's log so far. `config` and `given` are those of the last process that wrote it; `given` is what
    the user gave, without defaults, None in logs that do not say."""

    run: Mapping[str, Any]
    config: Mapping[str, Any]
    given: Mapping[str, Any] | None
    completed: bool


def read_records(log: Path) -> list[dict[str, Any]]:
    """The readable records of a log, in order; none where there is no log. Raises OSError."""
    found = []
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        try:
            found.append(records.decode(line))
        except records.BadLine:
            continue  # readers report it; a writer only goes on behind it
    return found


def past_of(found: list[dict[str, Any]]) -> Past | None:
    """The run that records tell of; None without a header."""
    run = next((record for record in found if record["record"] == "run"), None)
    if run is None:
        return None
    last = next((record for record in reversed(found) if record["record"] in ("resume", "run")), run)
    changed = last.get("changed") or {}
    ends = [record.get("status") for record in found if record["record"] in ("end", "resume")]
    config = changed.get("config", run["config"])
    given = changed.get("given", run.get("given"))
    return Past(run, config, given, bool(ends) and ends[-1] == "completed")


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
