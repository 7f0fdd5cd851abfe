"""Tensors of other processes on this host, readable as if they were this process's own.

On a GPU by CUDA's inter-process handles: what is opened has addresses of the own device, is read over the
link between the devices and costs no memory. On a CPU by shared memory, whose descriptors are opened where
Linux shows them: torch's names for shared memory need a process that keeps them, and it must answer
within a second.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puzzle.errors import describe

BOOT = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver."""


class Offer(NamedTuple):
    """What another process needs to open tensors: plain data. `device` as of `_place`. `views`: (storage,
    offset, shape, dtype)."""

    host: str
    device: str
    storages: tuple[tuple[Any, ...], ...]
    views: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]]


def offer(tensors: Mapping[str, Tensor], device: torch.device) -> Offer:
    """Handles of contiguous tensors for one other process, which opens them once.

    On a CPU their storages move to shared memory. RuntimeError where the platform or the allocator of the
    memory has no such handles.
    """
    handles: dict[int, tuple[int, tuple[Any, ...]]] = {}
    views = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in handles:
            shared = storage._share_cuda_() if device.type == "cuda" else _shared(storage)
            handles[storage.data_ptr()] = (len(handles), shared)
            key = storage.data_ptr()
        views[name] = (handles[key][0], int(tensor.storage_offset()), tuple(tensor.shape), tensor.dtype)
    return Offer(_host(), _place(device), tuple(handle for _, handle in handles.values()), views)


def unreachable(offered: Offer, device: torch.device, counts: bool = False) -> str | None:
    """Why this process cannot read what another offers, or, if it `counts` there, add to it atomically; None
    if it may try."""
    if offered.host != _host():
        return "it is on another host"
    if offered.device == _place(device):
        return None
    if device.type == "cpu":
        return "its processes are numbered in another namespace (a container of its own)"
    visible = {_place(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    if offered.device not in visible:
        return "its device is hidden (CUDA_VISIBLE_DEVICES)"
    if not torch.cuda.can_device_access_peer(device, visible[offered.device]):
        return "no peer access between the devices"
    if counts and not _native_atomics(device.index, visible[offered.device]):
        return "the link between the devices has no atomic operations"
    return None


def opened(offered: Offer, device: torch.device) -> dict[str, Tensor]:
    """The offered tensors; RuntimeError where the device refuses. The caller waits until they are written."""
    if device.type == "cuda":
        # The own device's number, not that of the memory: a copy out of it is then one of this device alone.
        # Without torch's event (the last item), which is for consumers on the memory's device.
        storages = [
            torch.UntypedStorage._new_shared_cuda(device.index, *handle[1:-1], False)
            for handle in offered.storages
        ]
    else:
        storages = [_mapped(*handle) for handle in offered.storages]
    found = {}
    for name, (number, offset, shape, dtype) in offered.views.items():
        strides = torch.empty(shape, device="meta").stride()
        empty = torch.empty(0, dtype=dtype, device=device)
        found[name] = empty.set_(storages[number], offset, shape, strides)
    return found


def _shared(storage: torch.UntypedStorage) -> tuple[int, int, int]:
    """Process, descriptor and bytes of a storage, shared from then on; the descriptor lives as long as it."""
    return os.getpid(), *storage._share_fd_cpu_()


def _mapped(process: int, descriptor: int, size: int) -> torch.UntypedStorage:
    """The storage that another process has in shared memory."""
    if size == 0:
        return torch.UntypedStorage(0)
    try:
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    except OSError as error:
        raise RuntimeError(describe(error)) from None
    try:
        return torch.UntypedStorage._new_shared_fd_cpu(own, size)  # ty: ignore[missing-attribute]
    finally:
        os.close(own)


def _host() -> str:
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return f"{socket.gethostname()} {boot}"


def _native_atomics(device: int, other: int) -> bool:
    """Whether atomic operations of a device on another one's memory are atomic: torch does not say."""
    found = ctypes.c_int(0)
    ask = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute
    return ask(ctypes.byref(found), NATIVE_ATOMICS, device, other) == 0 and found.value == 1


def _place(device: torch.device) -> str:
    """The device's identity; on a CPU the namespace in which numbers of processes are meant."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return os.readlink(NAMESPACE) if NAMESPACE.exists() else ""
