"""Writing a folder of results so that it is whole or untouched."""

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from puzzle.errors import UserError, describe
from puzzle.files import durable


@contextmanager
def whole(out: Path) -> Generator[Path]:
    """Gives a folder to write into; at the end its files replace those of the same names in `out`.

    The folder lies in `out`, or, while `out` does not exist, where its first missing parent will be: on the
    same file system, so that every file arrives in one step. After an error nothing of it remains.

    Raises UserError where `out` cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the output")
    home = out
    while not home.exists():
        home = home.parent
    if not home.is_dir():
        raise UserError(f"{home}: is a file; the output folder {out} cannot be made in it")
    try:
        staging = Path(tempfile.mkdtemp(prefix=".drawing-", dir=home))
    except OSError as error:
        raise UserError(f"{home}: cannot write the output there: {describe(error)}") from None
    try:
        yield staging
        _move(staging, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write the output: {describe(error)}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, out: Path) -> None:
    for file in staging.iterdir():
        if (out / file.name).is_dir():
            raise UserError(f"{out / file.name}: is a folder; it stands where an output file belongs")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        durable.put(file, out / file.name)
