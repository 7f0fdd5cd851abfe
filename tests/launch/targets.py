"""What the launched processes of the tests do."""

import ctypes
import os
import signal
import socket
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from puzzle.engine.runtime.watchdog import Heartbeat, Watch, Watchdog
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.launch import local


def _join() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def add_ranks(out: Path) -> None:
    rank = _join()
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    print(f"hello from {rank}", flush=True)
    (out / f"{rank}.txt").write_text(f"{total.item()} {os.environ['LOCAL_RANK']} {torch.get_num_threads()}")
    dist.destroy_process_group()
    os.chdir("/")  # as a reward function may


def fail(out: Path, kind: str) -> None:
    rank = _join()
    (out / f"{rank}.pid").write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        (out / "1.failed").touch()
        if kind == "user":
            raise UserError("the third prompt is empty")
        if kind == "bug":
            raise ValueError("a bug\nwith details")
        if kind == "disk":
            raise OSError(28, "No space left on device", "somewhere/file")
        if kind == "leave":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
    dist.barrier()


def watched(out: Path, kind: str, seconds: float) -> None:
    """Two sums under a watchdog of N = `seconds`; in between, a rank does what `kind` says."""
    if kind == "away":  # each rank on a host of its own, as far as watchdogs can tell
        mock.patch.object(socket, "gethostname", return_value=f"host{os.environ['RANK']}").start()
        kind = "stop 1"
    if kind == "busy":  # the host takes its time between the stopped rank's end and the others'
        leave = Watchdog._leave_stack

        def slowly(watchdog: Watchdog, sign: Heartbeat) -> None:
            time.sleep(2 * local.SETTLE_SECONDS)
            leave(watchdog, sign)

        mock.patch.object(Watchdog, "_leave_stack", slowly).start()
        kind = "stop 1"
    longest = 60.0 if kind == "limited" else 0.0
    with World.start("cpu", watch=Watch(seconds, local.report, out / "ranks", longest)) as world:
        (out / f"{world.rank}.pid").write_text(str(os.getpid()))
        world.sum(torch.ones(1))
        world.progress.mark("the lesson")
        if kind == f"stop {world.rank}":
            time.sleep(seconds / 4)
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.rank == 1:
            if kind == "recv":
                dist.recv(torch.zeros(2, 3), 0)
            elif kind == "endless":
                while True:
                    time.sleep(0.01)
                    with world.progress.writing:
                        (out / "saved").touch()
            elif kind == "slow":
                time.sleep(2.5 * seconds)
            elif kind == "limited":  # longer than a watchdog's patience and than its collectives' time-outs
                with world.progress.busy("an errand", 60.0):
                    time.sleep(31 * seconds)
            elif kind == "native":
                # PyDLL keeps the interpreter locked, as long native code does: no thread shows signs of life.
                ctypes.PyDLL(None).usleep(int(2.5e6 * seconds))
        total = world.sum(torch.ones(4))
        (out / f"{world.rank}.txt").write_text(str(total.tolist()))


def sleep(out: Path) -> None:
    (out / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(120)


def accuse(out: Path) -> None:
    """Tells of a hang, as a watchdog does, and lives on."""
    local.report("rank 7 hangs", True)
    sleep(out)


def share(out: Path) -> None:
    """Sums, objects and a pair's message, in a run whose ranks share their device."""
    with World.start("cpu", share_device=True) as world:
        total = world.sum(torch.ones(2) + world.rank)
        pair = world.groups([(0, 2)], "pair")
        found = [dist.get_backend(), total.tolist(), world.gather(world.rank), world.share([world.rank])]
        if pair is not None:
            box = torch.tensor([float(world.rank)])
            (dist.send if world.rank == 0 else dist.recv)(box, 2 - world.rank, group=pair)
            found += [dist.get_backend(pair), box.tolist()]
        (out / f"{world.rank}.txt").write_text(repr(found))
