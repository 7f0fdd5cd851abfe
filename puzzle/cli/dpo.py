"""`puzzle dpo`: direct preference optimisation."""

from collections.abc import Sequence

from puzzle.cli.train import command
from puzzle.config.supervised import DPOConfig


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return command("dpo", "Train a model to say preferred answers.", DPOConfig, arguments)
