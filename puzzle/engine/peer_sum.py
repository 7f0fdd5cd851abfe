"""Sums over a tensor group in which every rank reads its peers' memory: one kernel, one trip.

A decode pass sums a few hundred kilobytes twice per layer. There NCCL's time is that of its steps, not of
the link. Torch's symmetric memory gives every rank addresses of its peers' buffers; its kernel copies the
own part to its buffer, waits until all ranks have, and adds up what it reads. It may be part of a CUDA graph.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine import ipc
from puzzle.model.parallel import TensorGroup

READ_BYTES = 4 << 20
"""What a rank reads from its peers at most; of more, NCCL's algorithms read less."""

_ALIGNED = 16  # bytes that the kernel loads at a time


class PeerSum:
    """Sums of up to `elements` values of `dtype`. All ranks of the group make it, and call it, together."""

    def __init__(self, group: dist.ProcessGroup, elements: int, dtype: torch.dtype, device: torch.device):
        from torch.distributed import _symmetric_memory as symmetric

        self.group = group
        self.peers = dist.get_world_size(group) - 1
        self.buffer = symmetric.empty(elements, dtype=dtype, device=device)
        symmetric.rendezvous(self.buffer, group.group_name)

    def takes(self, x: Tensor) -> bool:
        """Whether `x` fits, and NCCL would not be faster. Equal on ranks whose tensors have one shape."""
        fits = x.dtype == self.buffer.dtype and x.numel() <= self.buffer.numel() and x.is_contiguous()
        return fits and x.nbytes % _ALIGNED == 0 and x.nbytes * self.peers <= READ_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor, the same on all ranks."""
        room = self.buffer[: x.numel()].view_as(x)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x, "sum", self.group.group_name)


def link(group: TensorGroup, elements: int, dtype: torch.dtype, device: torch.device) -> None:
    """Let a tensor group sum up to `elements` values that way, if all its ranks reach each other's memory.

    All ranks of the group together.
    """
    known = group.direct
    if group.group is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float32):
        return
    if isinstance(known, PeerSum) and known.buffer.dtype == dtype and known.buffer.numel() >= elements:
        return
    offers: list[ipc.Offer | None] = [None] * group.size
    allowed = os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0")
    dist.all_gather_object(offers, ipc.offer({}, device) if allowed else None, group=group.group)
    reach = all(offer is not None and ipc.unreachable(offer, device) is None for offer in offers)
    reached: list[bool] = [False] * group.size
    dist.all_gather_object(reached, reach, group=group.group)
    group.direct = PeerSum(group.group, elements, dtype, device) if all(reached) else None
