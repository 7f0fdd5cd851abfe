"""The one exception that means: the user can mend this; and how a command ends."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """One line for people: what is wrong, where, and how to mend it. The command line exits with code 2."""


def describe(error: OSError) -> str:
    """An error of the operating system (full disk, no permission, no such file) in one line."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command. Its own code (None: 0), 2 after a user error, 130 interrupted, 141 no one reads on."""
    try:
        return command() or 0
    except UserError as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as in `... | head`; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None:
            raise
        message = describe(error)
    print(f"error: {message.encode('utf-8', 'backslashreplace').decode()}", file=sys.stderr)
    return 2
