"""One command at a time writes a folder: a lock that ends with its processes, and a record of who holds it.

The lock is flock's, which NFS and most cluster file systems pass on to other hosts. Some take it on one host
alone, and some know none: so the holder also renews the time of its record, by which another host sees that
it lives.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from puzzle.errors import UserError
from puzzle.files import durable

NAME, SUBMISSION = ".lock", ".submission.lock"
"""The second is of a command that waits for its job, which takes the first."""
BEAT_SECONDS = 5.0
SILENT_BEATS = 4
"""A holder on another host whose record is not renewed for so long is gone."""
ENDING_SECONDS = 30.0
"""How long what a dead command started may take to notice and end."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who holds a folder; `began` tells two processes of one number apart (ticks since the host started)."""

    host: str
    boot: str
    pid: int
    began: str
    job: str | None
    since: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        job = os.environ.get("SLURM_JOB_ID")
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), _boot(), os.getpid(), _began(os.getpid()), job, since)

    @property
    def near(self) -> bool:
        """Whether it is of this host, whose processes can be asked for."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def lives(self) -> bool:
        """Whether the process is there, on this host."""
        return _began(self.pid) == self.began != ""

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _began(pid: int) -> str:
    """When a process began; empty if there is none, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def hold(folder: Path, name: str = NAME) -> Generator[int]:
    """Hold `folder`, which is made if need be, while the block lasts; gives the lock's file descriptor.

    Whoever has a copy of the descriptor holds the folder, too: hand it to processes that write there.
    Raises UserError naming the holder.
    """
    path = folder / name
    durable.make_folder(folder)
    descriptor = _take(path)
    over = threading.Event()
    beat = threading.Thread(target=_renew, args=(descriptor, over), daemon=True)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Holder.here())).encode(), 0)
        beat.start()
        yield descriptor
    finally:
        over.set()
        if beat.is_alive():
            beat.join()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _renew(descriptor: int, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a moment without its file server
            os.utime(descriptor)


def _take(path: Path) -> int:
    """The descriptor of the locked file, which still bears the name; UserError if somebody holds it."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(descriptor)
            if locked is not False and _same(descriptor, path):
                holder = _holder(descriptor)
                if holder is None or not _alive(holder, path, locked is True):
                    return descriptor
                raise _refusal(path, holder)
            holder = _holder(descriptor)
            ending = locked is True or holder is None or (holder.near and not holder.lives)
            if not ending or time.monotonic() > deadline:
                raise _refusal(path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.05)


def _lock(descriptor: int) -> bool | None:
    """Whether the file could be locked; None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether the opened file still bears the name: its last holder removed it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> Holder | None:
    """Who wrote the record; None for none, or one that is just being written."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):
        return None


def _alive(holder: Holder, path: Path, locked: bool) -> bool:
    """Whether the writer of a record lives although its lock did not keep this process out."""
    if holder.near:
        return not locked and holder.lives
    first = path.stat().st_mtime_ns
    for _ in range(SILENT_BEATS):
        time.sleep(BEAT_SECONDS)
        with path.open("rb") as file:  # opening asks a network file system anew
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False


def _refusal(path: Path, holder: Holder | None) -> UserError:
    folder = path.parent
    if holder is None:
        return UserError(f"{folder} is in use by another command; wait until it ends")
    if holder.near and not holder.lives:
        left = ", ".join(map(str, _having_open(path)))
        what = f"what {holder} started still lives (process {left or 'unknown'})"
        return UserError(f"{folder} is in use: the command has ended, but {what}; end it first")
    return UserError(f"{folder} is in use by {holder}; wait until it ends, end it, or name another folder")


def _having_open(path: Path) -> list[int]:
    """Processes of this host, but this one, that have the file open, as far as this user may see."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samefile(link, path):
                found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})
