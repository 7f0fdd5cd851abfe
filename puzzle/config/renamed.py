"""Keys of the configuration under their former names: still read, from files, command lines and logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, ...]


@dataclass(frozen=True)
class Renamed:
    """A key (or a section, with all below it) and its present name; `values` maps former words of it. Those
    that are `usual` mean what is the default now."""

    old: Key
    new: Key
    values: Mapping[str, str] = field(default_factory=dict)
    usual: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """For people: `ppo is now algorithm`."""
        words = "".join(f", {old} is {new}" for old, new in self.values.items())
        return f"{'.'.join(self.old)} is now {'.'.join(self.new)}{words}"


RENAMED = (
    Renamed(("ppo",), ("algorithm",)),
    Renamed(("switch", "fill"), ("switch", "source"), {"shards": "zero_shards"}),
    Renamed(("switch", "beside"), ("switch", "overlap")),
    Renamed(
        ("log", "tensorboard"),
        ("log", "trackers"),
        {"true": '["tensorboard"]', "false": "[]"},
        usual=frozenset({"false"}),
    ),
)


def present(key: Key) -> Key:
    """The present name of a key."""
    for renamed in RENAMED:
        if key[: len(renamed.old)] == renamed.old:
            return (*renamed.new, *key[len(renamed.old) :])
    return key


def modernised(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Renamed]]:
    """Nested values under present names, and what was renamed. A key given under both names stays under both,
    for validation to refuse."""
    values, found = dict(data), []
    for renamed in RENAMED:
        *parents, name = renamed.old
        above = _inside(values, parents)
        if above is None or name not in above:
            continue
        value, target = above[name], renamed.new[-1]
        if isinstance(value, bool) and renamed.values:  # a list of words, by now
            value = "true" if value else "false"
            usual = value in renamed.usual
            value = json.loads(renamed.values.get(value, value))
        else:
            usual = False
            value = renamed.values.get(value, value) if isinstance(value, str) else value
        section = _copied(values, parents)
        other = section.get(target)
        if other is not None and not _mergeable(value, other):
            continue
        section[target] = (
            {**other, **value} if isinstance(other, Mapping) and isinstance(value, Mapping) else value
        )
        del section[name]
        found += [] if usual else [renamed]
    return values, found


def _mergeable(value: Any, other: Any) -> bool:
    """Two sections without a key in common."""
    return isinstance(value, Mapping) and isinstance(other, Mapping) and not value.keys() & other.keys()


def _inside(values: Mapping[str, Any], parents: list[str]) -> Mapping[str, Any] | None:
    found: Any = values
    for name in parents:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _copied(values: dict[str, Any], parents: list[str]) -> dict[str, Any]:
    """The section at `parents`, copied on the way down, so that what was given stays as it was."""
    found = values
    for name in parents:
        found[name] = dict(found[name])
        found = found[name]
    return found
