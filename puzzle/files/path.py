"""`python -m` puts the working folder first on the path: nothing may be taken from there by chance."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def leave_working_folder() -> None:
    """Take the working folder from the path, where `python -m` without -P put it; but a checkout in which one
    stands is where this comes from, and what this process starts shall find it, too."""
    if sys.flags.safe_path or not sys.path or sys.path[0] != os.getcwd():
        return
    if Path(sys.path[0]).resolve() != ROOT:
        del sys.path[0]
        return
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), others)))


def expanded(path: str) -> str:
    """A path with ~ and $VARIABLES filled in, as a shell does; ValueError for a variable that is not set."""
    if os.path.lexists(path):
        return path
    filled = os.path.expandvars(os.path.expanduser(path))
    if left := re.search(r"\$(\w+|\{\w+\})", filled):
        raise ValueError(f"{left[0]} is not set in the environment")
    return filled
