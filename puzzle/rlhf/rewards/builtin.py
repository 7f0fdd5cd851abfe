"""Rewards that come with the project; as functions of a user, they are named `puzzle.rlhf.rewards:NAME`."""

from __future__ import annotations

from collections.abc import Sequence
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


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("vader_sentiment needs the package vaderSentiment") from None
    return SentimentIntensityAnalyzer()
