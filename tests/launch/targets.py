"""What the launched processes of the tests do."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from puzzle.errors import UserError


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


def fail(out: Path, kind: str) -> None:
    rank = _join()
    (out / f"{rank}.pid").write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        if kind == "user":
            raise UserError("the third prompt is empty")
        if kind == "bug":
            raise ValueError("a bug\nwith details")
        if kind == "disk":
            raise OSError(28, "No space left on device", "somewhere/file")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(out: Path) -> None:
    (out / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(120)
