"""Rewards that are Python functions of texts. Rewards of models are forwards of the engine."""

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from puzzle.errors import UserError


class FunctionReward:
    """`module:name`, called with lists of prompts and responses; gives one finite number per response."""

    def __init__(self, name: str) -> None:
        """Import the function, also from the working directory; raises UserError if there is none."""
        self.name = name
        self.function = _load(name)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores, one per response; raises UserError naming the function when it raises or gives nonsense."""
        try:
            scores = list(self.function(list(prompts), list(responses)))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"reward.function {self.name} raised {what} ({frame.filename}:{frame.lineno})"
            ) from error
        if len(scores) != len(responses):
            raise UserError(
                f"reward.function {self.name} gave {len(scores)} scores for {len(responses)} responses"
            )
        return [self._number(score, response) for score, response in zip(scores, responses, strict=True)]

    def _number(self, score: Any, response: str) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = float("nan")
        if number - number != 0:  # neither NaN nor infinite
            shown = response if len(response) <= 40 else response[:37] + "..."
            raise UserError(f"reward.function {self.name} gave {score!r} for the response {shown!r}")
        return number


def _load(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"reward.function {name!r}: expected module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"reward.function {name}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward.function {name}: {module_name} has no function {attribute}")
    return function


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
