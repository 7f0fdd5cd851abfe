"""The command line: `puzzle COMMAND ...`. Commands are imported when they run: help needs no torch."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from puzzle import __version__
from puzzle.errors import UserError, exit_code

# Each module has `run(arguments: list[str]) -> int | None`.
COMMANDS = {
    "train": "train a model by PPO",
    "generate": "answer prompts with a model folder",
    "convert": "turn a GGUF file into a Hugging Face model folder",
    "plan": "plan switches and shared pipelines, without devices",
    "bench": "measure and check on the devices of this host",
    "campaign": "run the experiments of the figures, then draw them",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user errors, in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{self.prog}: {message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it ended well, 2 after a user error, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"puzzle {__version__}")
        return 0
    return exit_code(lambda: dispatch("puzzle", COMMANDS, "puzzle.cli.", given))


def dispatch(program: str, commands: Mapping[str, str], module: str, given: list[str]) -> int | None:
    """Run the command that comes first, of the module `module` and its name; without one, list them."""
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {text}" for name, text in commands.items()]
        head, foot = f"usage: {program} COMMAND ...", f"{program} COMMAND --help says more."
        print("\n".join([head, "", *lines, "", foot]), flush=True)
        return 0 if given else 2
    if given[0] not in commands:
        raise UserError(f"{program} {given[0]}: unknown command; there are {', '.join(commands)}")
    return import_module(f"{module}{given[0]}").run(given[1:])
