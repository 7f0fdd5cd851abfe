"""What rewards are given of an iteration's responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARGUMENTS = ("prompts", "responses", "response_ids", "messages", "ids", "finished")
"""What a reward may ask for beside the columns of the data, which go by their own names."""


@dataclass(frozen=True)
class RewardBatch:
    """Lists with one entry per response: the texts of prompt and response, the response's token ids, the
    prompt's turns (None for plain text) and id, whether the response came to its end, and the prompt's
    columns."""

    prompts: list[str]
    responses: list[str]
    response_ids: list[list[int]]
    messages: list[list[Mapping[str, str]] | None]
    ids: list[str]
    finished: list[bool]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Responses."""
        return len(self.responses)

    def row(self, row: int) -> RewardBatch:
        """The batch of one response."""
        parts = [getattr(self, name)[row : row + 1] for name in ARGUMENTS]
        return RewardBatch(*parts, {name: values[row : row + 1] for name, values in self.columns.items()})

    def argument(self, name: str) -> list[Any]:
        """The list of one name; those of `ARGUMENTS` hide columns of the same name. KeyError for none."""
        return list(getattr(self, name) if name in ARGUMENTS else self.columns[name])

    @property
    def names(self) -> tuple[str, ...]:
        """All that `argument` knows."""
        return (*ARGUMENTS, *(name for name in self.columns if name not in ARGUMENTS))
