"""Whether two placements hold the same weights, by integer checksums of logical tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.engine.runtime.world import World
from puzzle.model.decoder import Decoder
from puzzle.model.weights import boxes
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.reshard.plan import SwitchPlan
from puzzle.plan.shards import Box, sharers
from puzzle.spec.model import ModelSpec
from puzzle.spec.tensors import TensorSpec

CHUNK = 1 << 22
"""Elements at a time: sums need a few int64 of each."""
MULTIPLIER = -7046029254386353131  # odd: 2**64 over the golden ratio, as a signed number
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    """int64 (): sum over the box of bit pattern times a weight of the element's place in the whole tensor.

    Sums of boxes that cover a tensor once are equal however it is cut; arithmetic is modulo 2**64.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    rows = max(1, CHUNK * len(values) // max(1, values.numel()))
    low = box.intervals[0][0]
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        place = torch.zeros((), dtype=torch.int64, device=values.device)
        stride = 1
        for dim in reversed(range(len(shape))):
            start = low + first if dim == 0 else box.intervals[dim][0]
            along = torch.arange(start, start + part.shape[dim], device=values.device) * stride
            place = place + along.view(-1, *[1] * (len(shape) - 1 - dim))
            stride *= shape[dim]
        weight = place * MULTIPLIER
        weight ^= weight >> 31
        bits = part.contiguous().view(INTEGERS[values.element_size()]).to(torch.int64)
        total += (bits * (weight | 1)).sum()
    return total


def copies(tensor: TensorSpec, layout: Layout) -> int:
    """How often a placement of the layout holds a tensor: every box as often, replicas included."""
    return layout.dp * len(sharers(tensor, layout, Coord(0, 0, 0)))


def checksums(spec: ModelSpec, placement: Placement, world: World, decoder: Decoder | None) -> Tensor:
    """int64 (tensors, most copies of any): copy d * n + k is what the k-th holders in replica d have.

    All ranks of the run call it; `decoder` is None where the placement leaves the rank out.
    """
    layout, tensors = placement.layout, spec.tensors()
    width = max(copies(tensor, layout) for tensor in tensors)
    found = torch.zeros((len(tensors), width), dtype=torch.int64, device=world.device)
    if decoder is not None:
        row = {tensor.name: i for i, tensor in enumerate(tensors)}
        coord = placement.coord_of(world.rank)
        for name, box, values in boxes(decoder, decoder.get_parameter):
            if name not in row:
                continue  # an adapter of the source, which is merged into what the plan moves
            tensor = tensors[row[name]]
            same = sharers(tensor, layout, coord)
            column = coord.d * len(same) + same.index(coord)
            found[row[name], column] += checksum(values, box, tensor.shape)
    return world.sum(found)


def compare(plan: SwitchPlan, world: World, source: Decoder | None, destination: Decoder | None) -> None:
    """RuntimeError on every rank, naming tensor and replica, unless all copies on both sides agree."""
    before = checksums(plan.spec, plan.source, world, source).tolist()
    after = checksums(plan.spec, plan.destination, world, destination).tolist()
    for side, placement, table in (("source", plan.source, before), ("destination", plan.destination, after)):
        layout = placement.layout
        for row, tensor in enumerate(plan.spec.tensors()):
            count = copies(tensor, layout)
            for copy in range(count):
                if table[row][copy] != before[row][0]:
                    d, k = divmod(copy, count // layout.dp)
                    raise RuntimeError(
                        f"switch: {tensor.name} differs in the {side} placement (replica {d}, holder {k}):"
                        f" checksum {table[row][copy]} instead of {before[row][0]}"
                    )
