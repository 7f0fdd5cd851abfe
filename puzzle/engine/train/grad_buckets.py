"""Where the gradients of one rank's parameters are added up: slots of parameters in buckets of float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puzzle.engine.runtime.tracing import Instant
from puzzle.model.invariant.sums import tree_sum
from puzzle.model.linear import Weight
from puzzle.model.parallel import all_gather_flat
from puzzle.plan.shards import LocalParam, zero_rows


@dataclass
class Slot:
    """Where one parameter lies in every replica's chunk of a bucket: from element `offset` on.

    This replica's own rows are [low, high).
    """

    local: LocalParam
    param: nn.Parameter
    offset: int
    low: int
    high: int
    empty: bool = True  # no gradient of this step has arrived yet


@dataclass
class Bucket:
    """Gradients that are reduced together."""

    dp: int
    slots: list[Slot] = field(default_factory=list)
    chunk: int = 0
    grads: Tensor | None = None  # fp32 (dp, chunk)
    shard: Tensor | None = None  # fp32 (chunk,): the sum over replicas of the own rows; NCCL's lies in grads
    exchanged: Tensor | None = None  # fp32 (dp, chunk): what every replica has of the own rows
    hits: int = 0
    work: dist.Work | None = None
    gathered: Tensor | None = None
    began: Instant | None = None  # when the collective under way was started

    def add(self, slot: Slot, grad: Tensor) -> None:
        """Add a gradient; the first of a step replaces what lies there, which saves a pass for zeros."""
        for rows, home in self._homes(slot):
            part = grad[rows].reshape(home.shape)
            if slot.empty:
                home.copy_(part)
            else:
                home.add_(part)
        self._arrived(slot)

    def add_product(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """`add` of left @ right, by the product itself."""
        assert isinstance(slot.param, Weight), f"{slot.local.name} is no matrix"
        for rows, home in self._homes(slot):
            slot.param.accumulate(home, left[rows], right, slot.empty)
        self._arrived(slot)

    def _homes(self, slot: Slot) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the parameter, where they are added up as a matrix) of every replica that has any."""
        assert self.grads is not None, f"{slot.local.name}: backward outside of a step"
        for d in range(self.dp):
            low, high = zero_rows(slot.local, self.dp, d)
            if low < high:
                size = (high - low) * slot.local.row_size
                yield slice(low, high), self.grads[d, slot.offset : slot.offset + size].view(high - low, -1)

    def _arrived(self, slot: Slot) -> None:
        slot.empty = False
        self.hits += 1

    def exchange(self, group: dist.ProcessGroup) -> None:
        """Start to bring here what every replica has of the own rows."""
        assert self.grads is not None
        self.exchanged = torch.empty_like(self.grads)
        self.work = dist.all_to_all_single(self.exchanged, self.grads, group=group, async_op=True)

    def add_exchanged(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        """Add up what has come, in the order of the replicas, whose `ranks` these are."""
        assert self.grads is not None
        assert self.exchanged is not None
        places = [dist.get_group_rank(group, rank) for rank in ranks]
        found = self.exchanged if places == sorted(places) else self.exchanged[places]
        self.shard, self.exchanged = self.grads[dist.get_rank(group)], None
        self.shard.copy_(tree_sum(found, 0))

    @torch.no_grad()
    def gather(self, group: dist.ProcessGroup) -> int:
        """Start to spread every replica's own rows of the parameters; bytes of all of them.

        They travel in the memory of the gradients, which the step has read, unless that was given back. The
        next pass finds the weights in place before it adds a gradient.
        """
        sample = self.slots[0].param
        if self.grads is None:
            self.gathered = torch.empty(self.dp * self.chunk, dtype=sample.dtype, device=sample.device)
        else:
            self.gathered = self.grads.view(-1).view(sample.dtype)[: self.dp * self.chunk]
        mine = self.gathered.view(self.dp, self.chunk)[dist.get_rank(group)]
        for slot in self.slots:
            own = slot.param[slot.low : slot.high].reshape(-1)
            mine[slot.offset : slot.offset + own.numel()] = own
        self.work = all_gather_flat(self.gathered, mine, group=group, async_op=True)
        return self.gathered.nbytes

    @torch.no_grad()
    def place(self, own: int) -> None:
        """Put what was gathered from all replicas but `own` into the parameters."""
        assert self.gathered is not None
        chunks = self.gathered.view(self.dp, self.chunk)
        for slot in self.slots:
            for d in range(self.dp):
                low, high = zero_rows(slot.local, self.dp, d)
                if d != own and low < high:
                    size = (high - low) * slot.local.row_size
                    rows = chunks[d, slot.offset : slot.offset + size]
                    slot.param[low:high] = rows.view(high - low, *slot.local.shape[1:])
        self.work = self.gathered = None


def fill_buckets(
    params: Sequence[tuple[LocalParam, nn.Parameter]], dp: int, d: int, limit: int
) -> list[Bucket]:
    """Buckets of at most `limit` elements, last layers first: the order in which backward completes them."""
    buckets = [Bucket(dp)]
    for local, param in reversed(params):
        size = -(-local.rows // dp) * local.row_size
        if buckets[-1].slots and (buckets[-1].chunk + size) * dp > limit:
            buckets.append(Bucket(dp))
        low, high = zero_rows(local, dp, d)
        buckets[-1].slots.append(Slot(local, param, buckets[-1].chunk, low, high))
        buckets[-1].chunk += size
    return buckets
