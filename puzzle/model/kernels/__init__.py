"""Triton kernels that stand in for plain functions on CUDA; imported only there."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for a CPU, where kernels are interpreted in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; no bound for a CPU."""
    if device.type != "cuda":
        return 1 << 30
    # CUDA keeps 1 KiB of a multiprocessor for each program that it runs.
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - (1 << 10)
