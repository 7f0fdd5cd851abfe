"""Sums of decode passes by kernels that read the memory of the other tensor ranks (`model.peer_sums`)."""

from __future__ import annotations

from itertools import permutations

import torch

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.transports import Unreachable, open_peers
from puzzle.model.numerics import Invariant
from puzzle.model.peer_sums import MOST_PROGRAMS, PeerSums, most_rows
from puzzle.model.pointwise import has_kernels


def peer_sums(runtime: ModelRuntime) -> PeerSums:
    """What sums of the runtime's decode passes need, mapped on every tensor rank; one at least has peers.

    All ranks of the run together. Unreachable where some tensor group has no such sums.
    """
    world, decoder, tensor = runtime.world, runtime.stage, runtime.tensor
    if isinstance(decoder.numerics, Invariant):
        raise Unreachable("invariant numerics add parts in a tree")
    if not has_kernels(world.device):
        raise Unreachable("kernels need a GPU and Triton")
    rows = most_rows(tensor.size, decoder.spec.hidden_size, decoder.dtype.itemsize)
    if rows == 0:
        raise Unreachable(f"a row of {tensor.size} ranks is more than a kernel reads")
    return mapped(runtime, rows)


def mapped(runtime: ModelRuntime, rows: int) -> PeerSums:
    """`peer_sums` for up to `rows` rows, wherever kernels run; all ranks of the run together."""
    from puzzle.model.kernels import multiprocessors

    world, placement = runtime.world, runtime.placement
    device, dtype = world.device, runtime.stage.dtype
    programs = min(MOST_PROGRAMS, *world.gather(multiprocessors(device)))
    own = {
        "buffers": torch.zeros((2, rows, runtime.spec.hidden_size), dtype=dtype, device=device),
        "counts": torch.zeros(programs, dtype=torch.int64, device=device),
    }
    world.synchronize()  # peers add to zeros
    pairs = [pair for ranks in placement.groups("tp") for pair in permutations(ranks, 2)]
    opened = open_peers(pairs, world, own, "sums of decode passes", counts=True)
    opened[world.rank] = own
    ranks = placement.tp_group(runtime.coord)
    buffers, counts = ([opened[rank][name] for rank in ranks] for name in own)
    return PeerSums(runtime.tensor.rank, buffers, counts)


def share_sums(runtime: ModelRuntime, wanted: str) -> str | None:
    """Have the runtime's decode passes sum so if that is `wanted` (peer, auto) and possible; else why not.

    All ranks of the run together. With one tensor rank there is nothing to sum.
    """
    if wanted == "collective" or runtime.tensor.size == 1:
        return None
    try:
        runtime.tensor.sums = peer_sums(runtime)
    except Unreachable as error:
        return str(error)
    return None
