"""What the command lines of the plotting programs share."""

import argparse
from pathlib import Path
from typing import NoReturn

from puzzle.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help tells the options")


def folder(name: str) -> Path:
    """The type of an option that names a folder: an empty name, as of a variable that is not set, does not
    mean the folder that one stands in."""
    if not name:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(name)
