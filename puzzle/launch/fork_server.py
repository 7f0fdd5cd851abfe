"""The process that forks this one's ranks: multiprocessing's fork server. It leaves nothing behind.

The attributes used here are multiprocessing's own, the same in 3.11 to 3.14.
"""

import atexit
import contextlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

MOST_SOCKET_FOLDER = 64
TRACKER_SECONDS = 2.0


def ensure(modules: Sequence[str]) -> None:
    """Have the server, with its socket out of the temporary directory, where a kill would leave it.

    What it forks has `modules` loaded, as far as a new interpreter finds them, unless it was running already.
    A descriptor still leads to the socket.
    """
    server: Any = multiprocessing.forkserver._forkserver
    process: Any = multiprocessing.current_process()
    server.set_forkserver_preload([*modules, "puzzle.launch.inside_fork_server"])
    own = process._config
    before = own.get("tempdir")
    # The name of a socket holds 107 bytes.
    short = None if len(tempfile.gettempdir()) <= MOST_SOCKET_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="puzzle-", dir=short) as folder:
        own["tempdir"] = folder
        try:
            server.ensure_running()
        finally:
            own["tempdir"] = before
        if Path(server._forkserver_address).parent == Path(folder):  # else it was running already
            descriptor = os.open(server._forkserver_address, os.O_PATH | os.O_CLOEXEC)
            server._forkserver_address = f"/proc/self/fd/{descriptor}"
            end_at_exit()


@contextlib.contextmanager
def without_main() -> Generator[None]:
    """What starts meanwhile does not import the program that starts it: a script without a `__main__` guard
    would run again in every process."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # with no file
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def ended(patience: float = 0.0) -> int | None:
    """The server's exit code, -N after signal N; None if it lives on for `patience` seconds, or never did."""
    server: Any = multiprocessing.forkserver._forkserver
    pid = server._forkserver_pid
    until = time.monotonic() + patience
    while pid is not None:
        try:
            # Who starts the next server collects this one.
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)
    return None


def end_at_exit() -> None:
    """This process outlives the server and the tracker that multiprocessing started for it."""
    atexit.unregister(_end)
    atexit.register(_end, os.getpid())


def _end(owner: int) -> None:
    if os.getpid() != owner:
        return
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_pid is not None:
        # All that it forked has ended.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
            os.waitpid(server._forkserver_pid, 0)
        server._forkserver_pid = None
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    if tracker._fd is not None and tracker._pid is not None:
        os.close(tracker._fd)  # its end, unless a user's code lent the pipe to a process that lives on
        until = time.monotonic() + TRACKER_SECONDS
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(tracker._pid, os.WNOHANG)[0] == 0 and time.monotonic() < until:
                time.sleep(0.005)
        tracker._fd = tracker._pid = None
