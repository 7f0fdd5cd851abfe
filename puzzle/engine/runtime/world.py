"""All processes of a run: this one's place, its device, process groups, and global sums for the algorithm."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine.runtime import shared_device
from puzzle.engine.runtime.free_memory import FreeMemory, host_free
from puzzle.engine.runtime.identity import Identity, check_address, launched
from puzzle.engine.runtime.tracing import Clock
from puzzle.engine.runtime.watchdog import LAST_RESORT, Progress, Watch, Watchdog
from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import Channel

YEARS = 3e8
"""Seconds; time-outs of torch.distributed are finite."""


class World:
    """This process among the run's processes; owns every process group, so that none is global.

    `moved` counts bytes this rank put into collectives and messages, by kind. `per_node` is the number of
    processes on each host, `per_device` of those that have this one's GPU. While `clock` is set, what runs is
    timed. `progress` says what this rank does. No group waits for a member longer than `timeout` seconds
    (torch's own limit where that is None).
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        *,
        per_node: int | None = None,
        per_device: int = 1,
        timeout: float | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.per_node, self.per_device = per_node or size, per_device
        # Groups do not inherit it from the default group.
        self.timeout = None if timeout is None else timedelta(seconds=timeout)
        self.moved: Counter[str] = Counter()
        self.clock: Clock | None = None
        self.progress = Progress()
        self.watchdog: Watchdog | None = None
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    @classmethod
    def start(
        cls,
        device: str = "auto",
        *,
        timeout: float = 600.0,
        watch: Watch | None = None,
        share_device: bool = False,
    ) -> World:
        """Join the run that torchrun's variables (RANK, WORLD_SIZE, ...) describe; alone without them.

        With `watch`, hangs are ended; groups wait longer than that takes. With `share_device`, a host's
        processes take its GPUs in turns (`shared_device`). UserError if the device is absent.
        """
        place = launched() or Identity()
        rank, size = place.rank, place.world
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        where, per_device = _device(kind, place, share_device)
        if kind == "cuda":
            _meet_device(where)
        if watch is not None:
            timeout = min(LAST_RESORT * watch.seconds + watch.longest, YEARS)
        if size > 1:
            check_address(rank)
            backend = "nccl" if kind == "cuda" else "gloo"
            if share_device:
                backend = shared_device.BACKEND
                shared_device.register()
            # Every channel has a communicator of its own, which is what this warning of torch's asks for.
            os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
            dist.init_process_group(
                backend,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
                device_id=where if backend == "nccl" else None,
            )
        world = cls(rank, size, where, per_node=place.per_node, per_device=per_device, timeout=timeout)
        if watch is not None and size > 1:
            world.watchdog = Watchdog(watch, rank, size, world.progress, world.moved)
        return world

    def __enter__(self) -> World:
        """The run lasts as long as the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the run. Not after an error: others may be waiting for this rank in a collective, and NCCL
        lets nobody leave alone; the error would never be told."""
        if self.watchdog is not None:
            if kind is None:
                self.watchdog.leave()
                self.sum(torch.zeros(1, device=self.device))  # all are here: nobody is missed from now on
            self.watchdog.stop(over=kind is None)
        if self.size > 1 and kind is None:
            dist.destroy_process_group()

    def groups(self, members: Iterable[tuple[int, ...]], purpose: str) -> dist.ProcessGroup | None:
        """Make the process groups of a purpose; gives this rank's, None for a rank alone.

        Every rank passes the same lists in the same order: torch names groups by how many it has made.
        """
        mine = None
        for ranks in members:
            if len(ranks) < 2:
                continue
            key = (purpose, ranks)
            if key not in self._groups:
                self._groups[key] = dist.new_group(list(ranks), timeout=self.timeout, group_desc=purpose)
            if self.rank in ranks:
                mine = self._groups[key]
        return mine

    def connect(self, ends: Iterable[tuple[int, int, Channel]]) -> dict[Channel, dist.ProcessGroup]:
        """Communicators of the channels (source rank, destination rank, channel) that end at this rank.

        Every rank passes the same set. The first message of an NCCL pair is a handshake of both, so all
        pairs shake hands here, in one order: later, two ranks could each wait for the other's first message.
        """
        mine = {}
        for src, dst, channel in sorted(ends):
            purpose = str(channel.payload)
            known = (purpose, (src, dst)) in self._groups
            group = self.groups([(src, dst)], purpose)
            if group is None:
                continue
            mine[channel] = group
            if not known:
                token = torch.zeros(1, device=self.device)
                if self.rank == src:
                    dist.send(token, dst, group=group)
                else:
                    dist.recv(token, src, group=group)
        return mine

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            self.moved["all_reduce"] += x.nbytes
        return x

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
            self.moved["all_reduce"] += x.nbytes
        return x

    def share(self, value: Any) -> Any:
        """Rank 0's value (plain Python data) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain Python data), by rank, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def warn(self, text: str | None) -> None:
        """Rank 0 prints what the first rank that has something warns of. All ranks call it."""
        told = next(filter(None, self.gather(text)), None)
        if self.rank == 0 and told is not None:
            print(f"warning: {told}", file=sys.stderr)

    @property
    def device_memory(self) -> int | None:
        """Bytes of this rank's device, or its part of them; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.device).total_memory // self.per_device

    def free_memory(self) -> FreeMemory | None:
        """What this rank may take now: of its device, or its part of what its host has free; all ranks call,
        before any takes much. None where the system does not say."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            part = torch.cuda.mem_get_info(self.device)[0] // self.per_device + unused
            told = "its device has free" if self.per_device == 1 else "its part of a shared device has free"
            found = FreeMemory(part, told)
        elif (free := host_free()) is not None:
            found = FreeMemory(free // self.per_node, "its part of this host's free memory is")
        else:
            found = None
        self.gather(None)  # nobody takes before all have looked
        return found

    def synchronize(self) -> None:
        """Wait until this rank's device is idle."""
        if self.device.type == "cuda":
            with self.progress.waiting("synchronize the device"):
                torch.cuda.synchronize(self.device)


def _device(kind: str, place: Identity, share: bool) -> tuple[torch.device, int]:
    """This process's device, made the current one, and how many processes of its host have it."""
    if kind != "cuda":
        return torch.device("cpu"), 1
    if not torch.cuda.is_available():
        raise UserError("device: cuda asked for but torch sees no GPU; use --device cpu")
    count, local = torch.cuda.device_count(), place.local_rank
    if local >= count and not share:
        raise UserError(
            f"layout: process {local} of this host has no GPU ({count} here); shrink tp, pp or dp (to check"
            " results alone, processes can share one: launch.share_device, in benches --share-device)"
        )
    number, per_device = shared_device.share(local, place.per_node, count) if share else (local, 1)
    where = torch.device("cuda", number)
    torch.cuda.set_device(where)
    # Threads of autograd meet cuBLAS first of all of the device; it helps itself, and says so.
    warnings.filterwarnings(
        "ignore", message="Attempting to run cuBLAS, but there was no current CUDA context"
    )
    return where, per_device


def _meet_device(device: torch.device) -> None:
    """Let the thread in which autograd runs backward passes of a device launch something of torch's there.

    That makes the device's context current in it, which torch leaves undone for the first device. Kernels of
    Triton that read by tensor descriptors do not help themselves, and they come first where a backward pass
    begins with a product: on all stages but the last.
    """
    leaf = torch.zeros(1, device=device, requires_grad=True)
    (2 * leaf).sum().backward()
