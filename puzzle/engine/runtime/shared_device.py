"""Process groups of ranks that share a GPU, which NCCL refuses: they talk to each other through the host.

    device -> copy in host memory -> gloo -> copy in host memory -> device

For checks of layouts with more ranks than there are GPUs; nothing else of a run changes. Tensors of a CPU go
the same way, so that this can be tested without a GPU. An operation reads its inputs when it is started,
after all that the device was told on the current stream; `wait` puts its outputs in place, on the stream of
whoever waits. So operations mean what NCCL's do, but for CUDA graphs: these cannot hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"
"""The name under which torch makes these groups."""


def register() -> None:
    """Tell torch of the backend."""
    dist.Backend.register_backend(BACKEND, Staged, devices=["cpu", "cuda"])


def share(local_rank: int, per_node: int, devices: int) -> tuple[int, int]:
    """Which of a host's devices a process uses, and how many of its `per_node` processes do: in turns."""
    mine = local_rank % devices
    return mine, len(range(mine, per_node, devices))


class StagedWork(dist.Work):
    """An operation of gloo under way; `land` puts what it brings in place."""

    def __init__(self, work: dist.Work, land: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._work, self._land = work, land

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the outputs are there, or RuntimeError; no timeout means that of the group."""
        done = self._work.wait(timeout)
        land, self._land = self._land, None  # only once: the caller may have changed the outputs since
        if land is not None:
            land()
        return done


class Staged(dist.ProcessGroup):
    """The operations that the engine uses; below, by which names torch calls them."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # ty: ignore[missing-argument, invalid-argument-type]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def reduced(self, tensors: Sequence[Tensor], opts: Any) -> StagedWork:
        """One tensor, in place, by whatever gloo can reduce by."""
        (x,) = tensors
        host = _staged(x)
        return StagedWork(self._gloo.allreduce([host], opts), lambda: _place(host, x))

    def spread(self, tensors: Sequence[Tensor], opts: Any) -> StagedWork:
        """One tensor, in place, from opts.rootRank of this group."""
        (x,) = tensors
        host = _staged(x)
        return StagedWork(self._gloo.broadcast([host], opts), lambda: _place(host, x))

    def gathered_list(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any
    ) -> StagedWork:
        """One input, and as many outputs as ranks."""
        (outs,), (x,) = outputs, inputs
        found = [_room(out) for out in outs]
        work = self._gloo.allgather([found], [_staged(x)], opts)
        return StagedWork(work, lambda: [_place(*pair) for pair in zip(found, outs, strict=True)])

    def gathered(self, output: Tensor, x: Tensor, opts: Any) -> StagedWork:
        """(n, ...) of every rank one behind the other."""
        _check(output, x, 1, self.size())
        found = torch.empty((self.size(), *x.shape), dtype=x.dtype)
        work = self._gloo.allgather([list(found.unbind())], [_staged(x)], opts)
        return StagedWork(work, lambda: _place(found.view(output.shape), output))

    def scattered(self, output: Tensor, x: Tensor, opts: Any) -> StagedWork:
        """The sum, in the order of ranks and the tensor's dtype, of what every rank has for this one."""
        if opts.reduceOp != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{BACKEND} groups reduce and scatter sums alone")
        _check(output, x, self.size(), 1)
        parts = _staged(x).view(self.size(), output.numel())
        found = torch.empty_like(parts)
        work = self._gloo.alltoall_base(found, parts, [], [], dist.AllToAllOptions())

        def land() -> None:
            total = found[0]
            for part in found[1:]:
                total += part
            _place(total.view(output.shape), output)

        return StagedWork(work, land)

    def exchanged(
        self, output: Tensor, x: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any
    ) -> StagedWork:
        """Rows of `x` to every rank, and rows of `output` from every rank."""
        found = _room(output)
        work = self._gloo.alltoall_base(found, _staged(x), output_sizes, input_sizes, opts)
        return StagedWork(work, lambda: _place(found, output))

    def sent(self, tensors: Sequence[Tensor], rank: int, tag: int) -> StagedWork:
        """One tensor to a rank of this group."""
        (x,) = tensors
        return StagedWork(self._gloo.send([_staged(x)], rank, tag))

    def received(self, tensors: Sequence[Tensor], rank: int, tag: int) -> StagedWork:
        """One tensor from a rank of this group."""
        (x,) = tensors
        found = _room(x)
        return StagedWork(self._gloo.recv([found], rank, tag), lambda: _place(found, x))

    def met(self, opts: Any) -> StagedWork:
        """All processes are here; what their devices do is not waited for."""
        return StagedWork(self._gloo.barrier(opts))


# Torch 2.13 renames what 2.11 calls as at the end of a line.
OPERATIONS: dict[str, Callable[..., StagedWork]] = {
    "allreduce": Staged.reduced,
    "broadcast": Staged.spread,
    "allgather": Staged.gathered_list,
    **dict.fromkeys(("all_gather_single", "_allgather_base"), Staged.gathered),
    **dict.fromkeys(("reduce_scatter_single", "_reduce_scatter_base"), Staged.scattered),
    **dict.fromkeys(("all_to_all_single", "alltoall_base"), Staged.exchanged),
    "send": Staged.sent,
    "recv": Staged.received,
    "barrier": Staged.met,
}
"""What torch.distributed calls, as it names it."""

LACKING = (
    *("allgather_coalesced", "all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
    *(
        "allreduce_coalesced",
        "alltoall",
        "gather",
        "monitored_barrier",
        "recv_anysource",
        "reduce",
        "scatter",
    ),
)
"""What torch has beside these, and nothing of the engine uses."""


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{name}: {BACKEND} groups have what the engine uses, and no more")

    return refuse


for _name, _operation in OPERATIONS.items():
    setattr(Staged, _name, _operation)
for _name in LACKING:
    setattr(Staged, _name, _refused(_name))


def _staged(x: Tensor) -> Tensor:
    """A contiguous copy in host memory of what `x` is when the current stream comes to this."""
    return _room(x).copy_(x.detach())


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _place(host: Tensor, x: Tensor) -> None:
    # A tensor of inference mode lets nobody write outside of it; any other may be written there.
    with torch.inference_mode():
        x.copy_(host)


def _check(output: Tensor, x: Tensor, outputs: int, inputs: int) -> None:
    """As other backends do; a copy alone would convert."""
    if output.dtype != x.dtype or outputs * output.numel() != inputs * x.numel():
        shapes = f"{output.dtype} {tuple(output.shape)} from {x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{BACKEND} groups: {shapes} in a group of {max(outputs, inputs)}")
