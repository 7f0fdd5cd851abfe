"""Files and folders that appear whole or not at all, and outlast a power cut once they are there.

Whatever is written under another name first gets its own by `put`: its contents are on the disk before the
rename, and the rename is when `put` returns. Modes are those that the writer gave, as a rule the umask's.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

_OPEN: AbstractContextManager[object] = nullcontext()
# What is answered for folders of file systems that cannot do this (some FUSE and network ones), and for
# devices and pipes: nothing to mend.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def sync(path: Path) -> None:
    """Bring to the disk what a file holds, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_open(descriptor)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int) -> None:
    """`sync` what is open already; devices and pipes have nothing to bring anywhere."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all files and folders in it."""
    for where, _, files in os.walk(folder):
        for file in files:
            sync(Path(where, file))
        sync(Path(where))


def make_folder(folder: Path) -> None:
    """Make a folder, with parents, unless it is there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def put(source: Path, target: Path, gate: AbstractContextManager[object] = _OPEN) -> None:
    """Rename a file or folder to `target`, in the same folder or file system, and make that last.

    While it renames it holds `gate`, by which whoever declares a run dead keeps it from writing any more.

    A folder that stands there makes room and then goes away: a moment between, only `settle` finds it.
    """
    sync_tree(source) if source.is_dir() else sync(source)
    old = _old(target)
    with gate:
        _back(old, target)
        if source.is_dir() and target.exists():
            os.replace(target, old)
        os.replace(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8): whoever sees it sees all of it."""
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write(path: Path, writer: Callable[[Path], object], gate: AbstractContextManager[object] = _OPEN) -> None:
    """Let `writer` make a file under another name beside `path` (the same suffix), then `put` it there."""
    if path.exists() and not path.is_file():  # a device or a pipe is written to, not replaced
        writer(path)
        return
    part = path.with_name(f".partial-{path.name}")
    try:
        writer(part)
        put(part, path, gate)
    finally:
        part.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Undo what writers of folders into `folder` left half done when their process was killed."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.glob(".*.old"):
        _back(old, old.with_name(old.name[1 : -len(".old")]))


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """The folders KIND-N in `folder` by their numbers, ascending; other names, as of copies, are none."""
    # Numbers as a program prints them: no copy bears another spelling of one.
    matches = ((re.fullmatch(f"{kind}-(0|[1-9][0-9]{{0,17}})", one.name), one) for one in folder.glob("*"))
    return dict(sorted((int(match[1]), one) for match, one in matches if match and one.is_dir()))


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _back(old: Path, target: Path) -> None:
    """Give the name back to a folder that made room for one that never came."""
    if old.is_dir() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)
