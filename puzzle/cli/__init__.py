"""The command line: `puzzle COMMAND ...`. Commands are imported when they run: help needs no torch."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from puzzle import __version__
from puzzle.cli import completion
from puzzle.errors import UserError, describe, exit_code
from puzzle.files.limits import MOST, MOST_NAME
from puzzle.files.path import expanded

# Each module has `run(arguments: list[str]) -> int | None`.
COMMANDS = {
    "train": "train a model by reinforcement learning (PPO, GRPO, ...)",
    "sft": "train a model to say what the assistant says in examples",
    "reward-model": "train a model to score preferred answers higher",
    "dpo": "train a model to say preferred answers, without a reward model",
    "evaluate": "score a model's answers to prompts",
    "generate": "answer prompts with a model folder",
    "prompts": "write prompts whose answers can be judged",
    "convert": "turn a GGUF file into a Hugging Face model folder",
    "plan": "plan switches and shared pipelines, predict iterations, without devices",
    "bench": "measure and check on the devices of this host",
    "report": "write a page about runs: curves, stages, memory, samples",
    "campaign": "run the experiments of the figures, then draw them",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user errors, in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{self.prog}: {message}")

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As in the base class; where a shell asks what could come next, that is said instead."""
        if completion.asked():
            completion.offer(self)
        return super().parse_args(*arguments, **options)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number in [least, most], in ASCII digits."""

    def read(text: str) -> int:
        wanted = f"at least {least}" if most == MOST else f"from {least} to {most}"
        # The digits are counted first: Python is slow with thousands of them.
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", text) or not least <= int(text) <= most:
            if re.fullmatch(r"\+?[0-9]{10,}", text):
                wanted = f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {wanted}")
        return int(text)

    return read


def real(above: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that is a finite number above `above` and at most `most`."""

    def read(text: str) -> float:
        try:
            value = float(text) if text.isascii() else math.nan
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value <= most):
            limit = f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r}: give a finite number above {above:g}{limit}")
        return value

    return read


def filled(text: str) -> str:
    """The type of an option that is a text, and not an empty one."""
    if not 0 < len(text) <= MOST_NAME:
        raise argparse.ArgumentTypeError(f"{text!r}: give a text of 1 to {MOST_NAME} characters")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text!r}: is no UTF-8 text")
    return text


def named(text: str) -> Path:
    """The type of an option that names a file or a folder: an empty name is not the folder one stands in.

    ~ and $VARIABLES are filled in also where the shell left them.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text!r}: is no UTF-8 text, as names of models are; rename it")
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def new_file(text: str) -> Path:
    """The type of an option that names a file to write: known to be none before work is done for it."""
    path = named(text)
    try:
        if path.is_dir() or text.endswith("/"):
            raise argparse.ArgumentTypeError(f"{text}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: no folder {path.parent}")
        path.exists()
    except OSError as error:  # a name that is too long, say
        raise argparse.ArgumentTypeError(describe(error)) from None
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it ended well, 2 after a user error, 130 when interrupted."""
    if arguments is None and completion.asked():
        return exit_code(lambda: _run(completion.typed()))
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"puzzle {__version__}")
        return 0
    return exit_code(lambda: _run(given))


def _run(given: list[str]) -> int | None:
    return dispatch("puzzle", COMMANDS, _home, given)


def _home(name: str) -> str:
    return f"puzzle.cli.{name.replace('-', '_')}:run"


def dispatch(
    program: str, commands: Mapping[str, str], home: Callable[[str], str], given: list[str]
) -> int | None:
    """Run the command that comes first, by the function that `home` names (`module:function`); without one,
    list them."""
    if completion.asked():
        if not given or given[0] not in commands:
            completion.offer_commands(commands)
        completion.descend()
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {text}" for name, text in commands.items()]
        head, foot = f"usage: {program} COMMAND ...", f"{program} COMMAND --help says more."
        print("\n".join([head, "", *lines, "", foot]), flush=True)
        return 0 if given else 2
    if given[0] not in commands:
        raise UserError(f"{program} {given[0]}: unknown command; there are {', '.join(commands)}")
    return resolve_name(home(given[0]))(given[1:])
