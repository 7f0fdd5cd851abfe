"""Which arguments a reward function takes: its parameters are names of what there is of each response."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from puzzle.errors import UserError
from puzzle.rlhf.rewards.batch import ARGUMENTS, RewardBatch

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Parameters:
    """The names in a function's signature, as plain values that processes can send one another.

    `leading` are those given by position alone, `required` the other ones without a default, `optional` those
    with one; `everything`: it takes any name (`**columns`). `shown` is the signature, `place` its file:line,
    `what` names the function in error lines.
    """

    what: str
    shown: str = "(prompts, responses)"
    place: str = ""
    leading: tuple[str, ...] = ("prompts", "responses")
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    everything: bool = False

    def by_position(self, names: Collection[str]) -> bool:
        """Whether the first two parameters, of names that nothing has, are (prompts, responses)."""
        first = self.required[:2]
        if self.leading or len(first) < 2:
            return False
        return first[0] not in names and (first[1] == "responses" or first[1] not in names)

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """Which of the columns `names` of `source` the function is given; UserError for a parameter that is
        neither a column nor an argument."""
        known = {*ARGUMENTS, *names}
        asked = [*self.leading, *self.required]
        if self.by_position(known):
            asked = asked[2:]
        for name in asked:
            if name not in known:
                there = ", ".join(name for name in names if name not in ARGUMENTS) or "no columns"
                where = f" ({self.place})" if self.place else ""
                raise UserError(
                    f"{self.what}{where} takes {self.shown}, but {name!r} is neither one of"
                    f" {', '.join(ARGUMENTS)} nor a column of {source}, which has {there}"
                )
        wanted = names if self.everything else [*asked, *(n for n in self.optional if n in names)]
        return [name for name in dict.fromkeys(wanted) if name not in ARGUMENTS]

    def arguments(self, batch: RewardBatch) -> tuple[list[Any], dict[str, Any]]:
        """The function's positional and keyword arguments for a batch."""
        names = batch.names
        leading, required = list(self.leading), list(self.required)
        if self.by_position(names):
            leading, required = ["prompts", "responses"], required[2:]
        wanted = names if self.everything else [*required, *(n for n in self.optional if n in names)]
        keywords = {name: batch.argument(name) for name in wanted if name not in leading}
        return [batch.argument(name) for name in leading], keywords


def parameters(what: str, function: Callable[..., Any], place: str = "") -> Parameters:
    """What a function takes. Without a signature, as some written in C, and with a bare `*args` it is called
    with (prompts, responses)."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return Parameters(what)
    found = signature.parameters.values()
    leading = [p.name for p in found if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    required = [p.name for p in found if p.kind in _NAMED and p.default is p.empty]
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    optional = [
        p.name for p in found if p.kind in _NAMED and p.default is not p.empty and p.name not in fixed
    ]
    bare = any(p.kind is p.VAR_POSITIONAL for p in found) and not leading and not required
    if bare or (len(leading) == 2 and not set(leading) & set(ARGUMENTS)):
        leading = ["prompts", "responses"]
    everything = any(p.kind is p.VAR_KEYWORD for p in found)
    return Parameters(what, str(signature), place, (*leading,), (*required,), (*optional,), everything)
