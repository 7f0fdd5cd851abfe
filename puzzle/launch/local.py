"""Start the processes of one run on this host, or join those that torchrun started.

Workers find each other through `env://`: the parent holds a TCPStore on a free port (loopback, on one host)
for as long as they live, so there is no fixed port and no moment in which another program could take it.
"""

import contextlib
import errno
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from puzzle.engine.runtime.identity import launched
from puzzle.errors import (
    TERMINATED,
    UserError,
    describe,
    leave,
    out_of_memory,
    print_anything,
    terminate_as_exit,
)
from puzzle.launch import fork_server
from puzzle.launch.deaths import DONE, Death, causes, death_of, first_of, server_death
from puzzle.launch.network import LOOPBACK, choose_interfaces, listen

# What the user can mend about files; other OSErrors, such as a lost connection, follow from another's death.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EMFILE, errno.ENFILE)
PEER_ENDED = signal.SIGUSR1
REPORT = "PUZZLE_REPORT"
"""Variable that tells a worker the file descriptor on which its launcher listens."""
SAFE_PATH = "PYTHONSAFEPATH"
"""Variable that keeps the working folder off a new interpreter's path."""
GRACE_SECONDS = 5.0
SETTLE_SECONDS = 0.5
MEANWHILE_SECONDS = 0.2
MOST_PER_CORE = 16
UNTOLD = 255
"""The exit code that multiprocessing makes up for processes whose fork server died."""


class WorkerError(Exception):
    """A worker died of something that is no user error; `code` is the exit code to hand on."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


@dataclass(frozen=True)
class Share:
    """What one host runs: ranks [first, first + count) of `world`; all meet in the store at address:port."""

    world: int
    first: int
    count: int
    address: str
    port: int


def threads_per_worker(world: int) -> int:
    """Cores of this host that each of `world` workers may use, unless OMP_NUM_THREADS says otherwise."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, len(os.sched_getaffinity(0)) // world)


def wait_passively() -> None:
    """Before torch loads: OpenMP's threads sleep while they wait, instead of taking the cores from whoever
    else computes on this host; a policy that is given stays."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run(
    target: str,
    args: Sequence[Any],
    world: int,
    logs: Path | None = None,
    *,
    apart: bool = False,
    keep: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run `target` ("module:function") as `world` processes; returns when all have ended well.

    In one process, or in a process of torchrun, it is a plain call; one process is started, too, if it shall
    live `apart` from this one. Otherwise `logs` receives the output of every rank but the first, and what the
    first has for programmers; every process keeps the file descriptor `keep` open while it lives, and
    `meanwhile` is called every MEANWHILE_SECONDS while they live. Raises UserError or WorkerError with the
    first failure's line, or what `meanwhile` raises, all processes gone.
    """
    wait_passively()
    if (place := launched()) is not None:
        if place.world != world:
            raise UserError(
                f"{place.world} processes were started (WORLD_SIZE) but tp x pp x dp is {world}; change"
                " layout.dp, or unset WORLD_SIZE and RANK"
            )
        with terminate_as_exit():
            _resolve(target)(*args)
    elif world == 1 and not apart:
        with terminate_as_exit():
            _resolve(target)(*args)
    else:
        _launch(target, args, world, logs, keep, meanwhile)


def _resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _launch(
    target: str,
    args: Sequence[Any],
    world: int,
    logs: Path | None,
    keep: int | None,
    meanwhile: Callable[[], None] | None,
) -> None:
    cores = len(os.sched_getaffinity(0))
    if world > MOST_PER_CORE * cores:
        most = f"at most {MOST_PER_CORE * cores} are started on its {cores} cores"
        raise UserError(f"{world} processes are too many for this host: {most}; lower tp, pp or dp")
    store = listen(LOOPBACK)
    death = host(target, args, Share(world, 0, world, LOOPBACK, store.port), logs, keep, meanwhile)
    if death is not None:
        raise_death(death, socket.gethostname(), logs)


def host(
    target: str,
    args: Sequence[Any],
    share: Share,
    logs: Path | None,
    keep: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Death | None:
    """Run this host's `share` of a run; the first failure, or None when all its processes ended well."""
    context = multiprocessing.get_context("forkserver")
    threads = threads_per_worker(share.count)
    wait_passively()
    # The server is `python -c`, which would find modules in the working folder first.
    with environment({"OMP_NUM_THREADS": str(threads), SAFE_PATH: "1"}):
        fork_server.ensure(("torch", target.partition(":")[0]))
    kept = None if keep is None else Connection(os.dup(keep), writable=False)
    alive, held = context.Pipe(duplex=False)  # closes when this process ends, however it ends
    workers: list[Any] = []
    reports: list[Connection] = []
    death, ending = None, signal.SIGTERM
    with terminate_as_exit():
        try:
            for local_rank in range(share.count):
                receive, send = context.Pipe(duplex=False)
                rank = share.first + local_rank
                log = None if logs is None else (logs / f"rank-{rank:03d}.txt").absolute()
                place = (share, local_rank, threads, log, os.environ.get(SAFE_PATH))
                pipes = (send, alive, kept)
                worker = context.Process(target=_work, args=(target, tuple(args), place, pipes))
                with fork_server.without_main():
                    worker.start()
                send.close()
                workers.append(worker)
                reports.append(receive)
            death = _watch(workers, reports, share.first, meanwhile)
            if death is not None:
                untold = any(worker.exitcode == UNTOLD for worker in workers)
                death = first_of([death, server_death(share.first, SETTLE_SECONDS if untold else 0.0)])
            ending = PEER_ENDED
        except (ConnectionError, EOFError) as error:
            ending = PEER_ENDED
            # Told to end, or a worker could not be started. What a worker has told already may be the cause.
            dead = server_death(share.first, 0.0 if type(error) is ConnectionError else SETTLE_SECONDS)
            death = first_of([dead, *causes(workers, reports, share.first)])
            if death is None:
                raise
        finally:
            _end(workers, ending)
            for pipe in (held, alive, kept):
                if pipe is not None:
                    pipe.close()
    return death


def _work(target: str, args: tuple[Any, ...], place: tuple, pipes: tuple) -> None:
    share, local_rank, threads, log, safe_path = place
    report, alive, _kept = pipes  # which is held while this function runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, leave)
    signal.signal(PEER_ENDED, peer_ended)
    threading.Thread(target=_die_with_parent, args=(alive,), daemon=True).start()
    if safe_path is None:  # what the run's functions start finds its modules as ever
        os.environ.pop(SAFE_PATH, None)
    if log is not None:
        _redirect(log, share.first + local_rank == 0)
    print_anything()
    values = {
        "RANK": share.first + local_rank,
        "WORLD_SIZE": share.world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": share.count,
        "MASTER_ADDR": share.address,
        "MASTER_PORT": share.port,
        REPORT: report.fileno(),
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # env:// joins that store, makes none
    import torch

    torch.set_num_threads(threads)
    try:
        choose_interfaces(share.address)
        _resolve(target)(*args)
    except UserError as error:
        _send(report, "user", str(error))
        raise SystemExit(2) from None
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            raise  # the launcher knows it by its exit code
        if isinstance(error, OSError) and error.errno in MENDABLE:
            _send(report, "user", describe(error))
            raise SystemExit(2) from None
        if (lack := out_of_memory(error)) is not None:
            _send(report, "user", f"rank {share.first + local_rank}: {lack}")
            raise SystemExit(2) from None
        text = str(error).strip().splitlines()
        trace = traceback.format_exc()
        if log is not None:
            os.write(2, trace.encode("utf-8", "backslashreplace"))
        line = f"{type(error).__name__}: {text[0] if text else ''}"
        _send(report, "error", line, "" if log is not None else trace)
        raise SystemExit(1) from error
    else:
        _send(report, DONE, "")
    finally:
        if log is not None and log.stat().st_size == 0 and share.first + local_rank == 0:
            log.unlink()


def _redirect(log: Path, first: bool) -> None:
    """Send this process's output to `log`; of the `first` rank what Python does not say, such as a library's
    stacks: it talks to people."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        if first:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        else:
            os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def report(line: str, first: bool, kind: str = "hang") -> None:
    """Say why all processes of the run end, from any thread: to the launcher that started this one, or,
    where that is another program, on stderr, if `first`. `kind` is a Death's."""
    if REPORT in os.environ:
        _send(Connection(os.dup(int(os.environ[REPORT])), readable=False), kind, line)
    elif first:
        print(f"error: {line}", file=sys.stderr, flush=True)


def _send(report: Connection, kind: str, line: str, trace: str = "") -> None:
    """Tell the launcher; nobody, where it is gone: its processes end with it."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        report.send((time.time(), kind, line, trace))


def peer_ended(_number: int, _frame: Any) -> None:
    """Handles PEER_ENDED: this process ends as those do that lose their connections by another's death."""
    raise ConnectionError("another process of the run ended")


def _die_with_parent(alive: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _watch(
    workers: Sequence[Any],
    reports: Sequence[Connection],
    first: int,
    meanwhile: Callable[[], None] | None,
) -> Death | None:
    """Wait for all workers, or for the first failure and those that follow from it within a moment."""
    running = {worker.sentinel: number for number, worker in enumerate(workers)}
    while running:
        if meanwhile is not None:
            meanwhile()
        for sentinel in wait(list(running), None if meanwhile is None else MEANWHILE_SECONDS):
            number = running.pop(sentinel)
            workers[number].join()
            death = death_of(first + number, workers[number], reports[number])
            if death is not None:
                deadline = time.monotonic() + SETTLE_SECONDS
                while running and (left := deadline - time.monotonic()) > 0:
                    for other in wait(list(running), timeout=left):
                        workers[running.pop(other)].join()
                others = [n for n in range(len(workers)) if n != number and not reports[n].closed]
                return first_of([death, *(death_of(first + n, workers[n], reports[n]) for n in others)])
            reports[number].close()
    return None


def _end(workers: Sequence[Any], number: int) -> None:
    """End workers by a signal that lets them unwind and finish their log, the slow ones by force."""
    for signal_number, seconds in ((number, GRACE_SECONDS), (signal.SIGKILL, math.inf)):
        for worker in filter(_lives, workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal_number)
        until = time.monotonic() + seconds
        while any(map(_lives, workers)) and time.monotonic() < until:
            time.sleep(0.005)


def _lives(worker: Any) -> bool:
    """Whether a worker is there, also one of which a dead fork server can say nothing."""
    if worker.is_alive():
        return True
    if fork_server.ended() is None:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def raise_death(death: Death, where: str, logs: Path | None) -> NoReturn:
    """The death of a rank on host `where`, as the error that ends the command."""
    if death.kind == "user":
        raise UserError(death.line)
    if death.kind == "hang":  # names the rank that hangs, which others noticed
        raise WorkerError(death.line + (f"; stacks: {logs}" if logs is not None else ""), death.code)
    file = None if logs is None else logs / f"rank-{death.rank:03d}.txt"
    told = file is not None and (death.rank > 0 or (file.exists() and file.stat().st_size > 0))
    log = f"; its log: {file}" if told else ""
    sys.stderr.write(death.trace)
    raise WorkerError(f"rank {death.rank} on {where}: {death.line}{log}", death.code)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Generator[None]:
    """Variables of this process, and of what it starts, while the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
