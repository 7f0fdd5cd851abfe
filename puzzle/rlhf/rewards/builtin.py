"""Rewards that come with the project; as functions of a user, they are named `puzzle.rlhf.rewards:NAME`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from puzzle.errors import UserError


def letter_share(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of a response that is ASCII letters or spaces; what a model of bytes learns."""
    counts = [sum(c == " " or (c.isascii() and c.isalpha()) for c in response) for response in responses]
    return [count / max(1, len(response)) for count, response in zip(counts, responses, strict=True)]


def vader_sentiment(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Sentiment of each response alone, from -1 to 1: VADER's compound score (Hutto & Gilbert 2014)."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]


def exact_answer(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    r"""1 where a response's answer is that of the column `answer`, else 0.

    A response's answer is what its last `\boxed{...}` holds, else its last number. The column's is the same
    of what it has after its last ####, as GSM8K writes it, else all of that. Numbers are compared by value,
    other texts without regard to case, spaces and $.
    """
    return [
        float(_same(_boxed(response) or _last_number(response), _expected(right)))
        for response, right in zip(responses, answer, strict=True)
    ]


def said_answer(response: str) -> str:
    """The answer of a response in one spelling, as `exact_answer` finds and compares it; of a response
    without a box or a number, all of it."""
    found = _boxed(response) or _last_number(response) or response
    number = _number(found)
    return _plain(found) if number is None else str(number)


def _expected(right: Any) -> str:
    text = str(right).rpartition("####")[2]
    return _boxed(text) or text


def _same(found: str | None, expected: str) -> bool:
    if found is None:
        return False
    numbers = _number(found), _number(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _plain(found) == _plain(expected)


def _boxed(text: str) -> str | None:
    """What the last whole box holds, with the braces in it; None without one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start + len("\\boxed{") : end].strip() or None
    return None


_NUMBER = re.compile(r"(?:(?<![\w.)\]}])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)/\d+|\.\d+)?")
_MOST_DIGITS = 1000


def _last_number(text: str) -> str | None:
    found = [match[0] for match in _NUMBER.finditer(text.replace("\u2212", "-")) if match[0].strip("-")]
    return found[-1] if found else None


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number and no more; thousands may have commas, a $ may stand about it."""
    text = _plain(text).replace("\u2212", "-")
    if len(text) > _MOST_DIGITS or not text.strip("-") or _NUMBER.fullmatch(text) is None:
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return "".join(text.lower().replace("$", "").split()).removesuffix(".")


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("vader_sentiment needs the package vaderSentiment") from None
    return SentimentIntensityAnalyzer()
