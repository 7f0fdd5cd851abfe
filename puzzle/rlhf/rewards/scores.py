"""What counts as scores: one finite number per response."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from puzzle.errors import UserError

LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32, in which scores go on."""


def checked_scores(
    what: str, given: Any, responses: Sequence[str], first: int = 0, of: int = 0
) -> list[float]:
    """The numbers that `what` gave for `responses`, which are those from number `first` of `of` (0: these).

    UserError naming the response for what is no list of one finite number per response.
    """
    scores = given
    if not isinstance(given, (list, tuple)) and callable(getattr(given, "tolist", None)):
        scores = given.tolist()  # an array or a tensor
    if not isinstance(scores, (list, tuple)):
        raise UserError(f"{what} gave {shown(given)}; return a list of one number per response")
    if len(scores) != len(responses):
        raise UserError(f"{what} gave {len(scores)} scores for {len(responses)} responses")
    return [
        _number(what, score, f"{shown(response)} ({first + row + 1} of {of or len(responses)})")
        for row, (score, response) in enumerate(zip(scores, responses, strict=True))
    ]


def _number(what: str, score: Any, response: str) -> float:
    number = _as_float(score)
    if abs(number) <= LARGEST:
        return number
    why = "" if not math.isfinite(number) else f"; float32 ends at {LARGEST:.2g}, scale or clip it"
    raise UserError(f"{what} gave {shown(score)} for the response {response}{why}")


def _as_float(score: Any) -> float:
    """NaN for what is no real number; texts are none, whatever they spell."""
    if isinstance(score, (str, bytes, bytearray)):
        return math.nan
    if isinstance(score, numbers.Complex) and not isinstance(score, numbers.Real):
        return math.nan
    try:
        return float(score)
    except Exception:  # noqa: BLE001 - a user's object: the caller shows it
        return math.nan


def shown(value: Any, most: int = 40) -> str:
    """What a user's value looks like, in few characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - integers of thousands of digits, objects of users
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."
