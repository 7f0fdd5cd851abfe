"""Triton kernels that stand in for plain functions on CUDA; imported only there."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for a CPU, where kernels are interpreted in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
