"""What a device can do at best, what it is, and how long work on it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from puzzle.engine.runtime.world import World

PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 FLOP/s by a word of the device's name, from the vendor's data sheets (SXM parts)."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where no data sheet is known, as for a CPU."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((PEAKS[word] for word in words if word in PEAKS), None)


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
    return out


def measure(world: World, work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat of `work`, from when all ranks start until the last rank's device is done."""
    found = []
    for _ in range(repeats):
        meet(world)
        start = time.perf_counter()
        work()
        world.synchronize()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=world.device)
        found.append(float(world.max(seconds)))
    return found


def meet(world: World) -> None:
    """Wait for every rank with an idle device."""
    world.synchronize()
    if world.size > 1:
        dist.barrier()
        world.synchronize()


def copy_bandwidth(world: World, size: int = 1 << 30) -> float:
    """Bytes read and written per second by copies of `size` bytes on the device: the median of nine times.

    On a GPU eight copies are timed together: starting one and waiting for it takes a twentieth of its time.
    """
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = 8 if world.device.type == "cuda" else 1
    seconds = statistics.median(measure(world, lambda: [target.copy_(source) for _ in range(copies)], 9))
    return 2 * size * copies / seconds


def reset_peak(device: torch.device) -> None:
    """Count the peak of device memory from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(world: World) -> int | None:
    """Largest peak of device memory over the ranks since `reset_peak`; None on a CPU."""
    if world.device.type != "cuda":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated(world.device), device=world.device)
    return int(world.max(peak))
