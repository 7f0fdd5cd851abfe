"""`puzzle sft`: supervised fine-tuning on chats, or on prompts with responses."""

from collections.abc import Sequence

from puzzle.cli.train import command
from puzzle.config.supervised import SFTConfig


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Train a model to say what the assistant says in examples."
    return command("sft", about, SFTConfig, arguments)
