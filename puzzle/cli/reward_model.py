"""`puzzle reward-model`: a reward model out of preferences."""

from collections.abc import Sequence

from puzzle.cli.train import command
from puzzle.config.supervised import RewardModelConfig


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Train a model to score preferred answers higher."
    return command("reward-model", about, RewardModelConfig, arguments)
