"""A text of a page with slots for its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Values = Callable[[], Sequence[float | str]]
SLOT = re.compile(r"\{[^{}]*\}")
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Claim:
    """A text of `page` whose slots, as of `str.format`, have the `values` that the logs give."""

    page: str
    text: str
    values: Values

    def rendered(self) -> str:
        return self.text.format(*self.values())

    def pattern(self) -> re.Pattern[str]:
        """The text with any numbers in its slots."""
        return re.compile(NUMBER.join(map(re.escape, SLOT.split(self.text))))
