"""Text files that people name: read whole, within a limit, and never waited for without end."""

import os
from pathlib import Path

from puzzle.errors import UserError

MOST_BYTES = 1 << 30


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file, or of a pipe that somebody writes; UserError for folders and for more than `most`.

    A pipe without a writer is empty, and an endless device is too large: neither is waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            os.set_blocking(descriptor, True)
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{str(path)!r}: no name of a file") from None
    if len(data) > most:
        raise UserError(f"{path}: more than {most >> 20} MiB, which no file of its kind has")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """As `read_bytes`, decoded from UTF-8; UserError for other encodings."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
