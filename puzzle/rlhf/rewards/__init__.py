"""Rewards that are no forwards of the engine: Python functions and servers (docs/rewards.md)."""

from puzzle.rlhf.rewards.builtin import exact_answer, letter_share, vader_sentiment

__all__ = ["exact_answer", "letter_share", "vader_sentiment"]
