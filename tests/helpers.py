"""Real ranks for tests: `run_ranks(fn, n, *args)` runs `fn(rank, *args)` in n gloo processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE = 600.0
"""Seconds for what takes a few on a quiet machine: only what hangs takes so long."""
# torch.optim imports torch._dynamo at its first use: seconds, in every rank, unless it is there before.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "tests.reference.tiny", "puzzle.rlhf.trainer"]


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def _rank_main(
    pipe: Connection, fn: Callable[..., Any], rank: int, world: int, store: str, timeout: float, args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        answer = (True, fn(rank, *args))
        _meet(dist.FileStore(f"{store}.end", world), world)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        answer = (False, traceback.format_exc())
    # Plain pickle: torch's own pickler shares memory with a process that is about to end.
    pipe.send_bytes(pickle.dumps(answer))


def _meet(store: Any, world: int) -> None:
    """Wait for all ranks: one that ends closes its connections, which another may only now be making."""
    store.add("ended", 1)
    while store.add("ended", 0) < world:
        time.sleep(0.01)


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Run `fn(rank, *args)` on `world` processes with a gloo default group; the results by rank.

    `fn` is a top-level function of an importable module; results and arguments are pickled. The first rank
    that raises or dies ends all the others; so does the timeout (seconds).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, fn, rank, world, os.path.join(folder, "store"), timeout, args),
                    daemon=True,
                )
                process.start()
                theirs.close()
                ranks.append(process)
                pipes.append(ours)
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.join(1.0 if process.exitcode is not None else 0.2)
                if process.is_alive():
                    process.kill()
                    process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not end in time")
        for pipe in [pipe for pipe in waiting if pipe in ready]:
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if not ok:
                raise RankError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return results
