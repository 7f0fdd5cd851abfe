"""What a device can do at best, what it is, and how long work on it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.cuda import nccl

from puzzle.engine.runtime.world import World
from puzzle.spec.flops import peak_flops

T = TypeVar("T")
COPIED = 1 << 30
"""Bytes that are copied to measure a device's bandwidth."""
WIDE = 8192
"""Rows and columns of the products that keep a device busy; one takes some milliseconds."""
LONGEST = 512
"""Products that keep a device busy at most: by then work waits for it, and cannot be issued beforehand."""


def facts(world: World) -> dict[str, Any]:
    """Where a measurement was taken: device, versions, number of processes."""
    out: dict[str, Any] = {"torch": torch.__version__, "processes": world.size, "device": "cpu"}
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        out |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, nccl.version())),
        }
    return out | {"threads": torch.get_num_threads()}


def meet(world: World) -> None:
    """Wait for every rank with an idle device."""
    world.synchronize()
    if world.size > 1:
        dist.barrier()
        world.synchronize()


def most(world: World, number: float) -> float:
    """The largest of the ranks' numbers."""
    return float(world.max(torch.tensor(number, dtype=torch.float64, device=world.device)))


def measure(world: World, work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat of `work`, from when all ranks start until the last rank's device is done."""
    found = []
    for _ in range(repeats):
        meet(world)
        start = time.perf_counter()
        work()
        world.synchronize()
        found.append(most(world, time.perf_counter() - start))
    return found


def lanes(
    world: World, work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Median seconds of `work` on the device and of the host to issue it, after runs that warm up; `before`
    is not timed.

    The device is kept busy until all has been issued, so that it never waits for its host; of several ranks
    the last to begin is timed. On a CPU, which is both, either is what `work` takes.
    """
    for _ in range(2):
        before()
        work()
    cuda = world.device.type == "cuda"
    devices, hosts = [], []
    busy = Busy(world.device) if cuda else None
    while len(hosts) < repeats:
        before()
        meet(world)
        begin = end = None
        if busy is not None:
            busy.start()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        work()
        issued = time.perf_counter() - start
        if busy is None or begin is None or end is None:
            devices.append(most(world, issued))
            hosts.append(devices[-1])
            continue
        late = begin.query()
        end.record()
        world.synchronize()
        if most(world, float(late)) and busy.longer():
            continue
        devices.append(-most(world, -begin.elapsed_time(end) / 1e3))
        hosts.append(most(world, issued))
    return median(devices), median(hosts)


class Busy:
    """Products that a GPU works at while its host issues what comes after them."""

    def __init__(self, device: torch.device) -> None:
        self._one = torch.randn((WIDE, WIDE), device=device).bfloat16()
        self._out = torch.empty_like(self._one)
        self._count = 4

    def start(self) -> None:
        """Begin some."""
        for _ in range(self._count):
            torch.mm(self._one, self._one, out=self._out)

    def longer(self) -> bool:
        """Twice as many from now on; False where that would be too many."""
        if 2 * self._count > LONGEST:
            return False
        self._count *= 2
        return True


def alternated(ways: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each of several ways gives in each of its runs, all taking turns."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def copy_bandwidth(world: World) -> float:
    """Bytes read and written per second by copies of `COPIED` bytes on the device: the median of nine times.

    On a GPU eight copies are timed together: starting one and waiting for it takes a twentieth of its time.
    """
    source = torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = 8 if world.device.type == "cuda" else 1
    seconds = median(measure(world, lambda: [target.copy_(source) for _ in range(copies)], 9))
    return 2 * COPIED * copies / seconds


def mfu(world: World, flops: float, seconds: float) -> float | None:
    """Of all ranks' dense bf16 rate, the share that `flops` in `seconds` take; None where no data sheet is
    known, as for a CPU."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    return None if peak is None else flops / seconds / world.size / peak


def reset_peak(device: torch.device) -> None:
    """Count the peak of device memory from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(world: World) -> int | None:
    """Largest peak of device memory over the ranks since `reset_peak`; None on a CPU."""
    if world.device.type != "cuda":
        return None
    return int(most(world, torch.cuda.max_memory_allocated(world.device)))


def gib(peak: int | None) -> str:
    """A peak of memory at the end of a line; nothing where none was counted."""
    return "" if peak is None else f"  peak {peak / 2**30:.1f} GiB"
