"""Rewards that are no forwards of the engine: Python functions and servers (docs/rewards.md)."""

from puzzle.rlhf.rewards.builtin import letter_share, vader_sentiment

__all__ = ["letter_share", "vader_sentiment"]
