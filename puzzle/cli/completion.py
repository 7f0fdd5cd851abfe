"""What a shell offers while a command is typed, by the package argcomplete.

The shell calls the program with the line in COMP_LINE and, in _ARGCOMPLETE, the number of its words that are
the program's name.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import NoReturn

_LINE, _WORDS = "COMP_LINE", "_ARGCOMPLETE"


def asked() -> bool:
    """Whether a shell asks what could come next, instead of having the command run."""
    return _WORDS in os.environ and _LINE in os.environ


def typed() -> list[str]:
    """The whole words before the one that is being typed, without the program's name."""
    from argcomplete.lexers import split_line

    line = os.environ[_LINE]
    _, _, _, words, _ = split_line(line, int(os.environ.get("COMP_POINT", len(line))))
    return words[int(os.environ[_WORDS]) :]


def descend() -> None:
    """The name of a command belongs to the program's name from here on."""
    os.environ[_WORDS] = str(int(os.environ[_WORDS]) + 1)


def offer_commands(names: Iterable[str]) -> NoReturn:
    """Offer the names of commands."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("command", choices=sorted(names))
    offer(parser)


def offer(parser: argparse.ArgumentParser) -> NoReturn:
    """Offer what a parser takes at this place."""
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)
    sys.exit(1)  # argcomplete has ended the process, unless a shell asked that it does not know
