"""How many pages of a key/value cache a device has room for."""

from __future__ import annotations

import torch

from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.reshard.resharder import lends_pages
from puzzle.engine.runtime.world import World
from puzzle.model.decoder import Decoder
from puzzle.model.numerics import Invariant
from puzzle.plan.layout import Placement
from puzzle.plan.memory import Use, generation_passes
from puzzle.plan.pages import KEPT_FREE, kv_bytes


def fitting_pages(
    passes: ModelRunner, wanted: int, page: int, world: World, work: tuple[int, int, int], least: int = 0
) -> int:
    """Pages of `page` positions that the memory of every rank holds, besides the weights and passes; all
    ranks of the run ask. `work`: tokens of a prefill pass, rows of a decode pass, and tokens whose keys and
    values a prefill pass copies, as in `plan.memory.generation_passes`.

    A cache that is there is given back, unless it has as many as are wanted, or the runner keeps it and it
    has `least`. On a CPU as many as are wanted.
    """
    decoder = passes.decoder
    if decoder.device.type != "cuda":
        return wanted
    stays = passes.cache is not None and passes.cache.k.shape[2] > (least if passes.keeps else wanted)
    if passes.keeps:
        # All record, or nobody: what a graph holds of a communicator is arranged by its ranks together.
        moved = torch.tensor(int(bool(wanted) and not (stays and passes.unmoved)), device=world.device)
        if int(world.max(moved)):
            passes.release()
            stays = False
    if not wanted:
        held = 1 << 60
    elif stays:
        assert passes.cache is not None
        held = passes.cache.k.shape[2] - 1
    else:
        passes.release()
        parts = decoder.numerics.parts if isinstance(decoder.numerics, Invariant) else None
        placement = Placement.default(decoder.layout)
        use = Use("model", decoder.spec, placement, decoder.dtype.itemsize, parts=parts)
        beside = sum(generation_passes(use, decoder.coord.p, *work).values())
        size = cache_bytes(decoder) * page
        room = cache_memory(decoder.device, (wanted + 1) * size + beside, world.per_device) or 0
        held = (room - beside) // size - 1
    return -int(world.max(torch.tensor(-held, device=world.device)))


def cache_memory(device: torch.device, enough: float, ranks: int = 1) -> int | None:
    """Bytes that a cache may take there now, of a device that `ranks` of the run have; None on a CPU.

    To give back what torch keeps unused, and take it again, costs 8 ms per GB. Single pages it can move
    itself; so these are given back only where they are not `enough`, to know what there is.
    """
    if device.type != "cuda":
        return None
    if lends_pages():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if (room := _room(device, unused, ranks)) >= enough:
            return room
    torch.cuda.empty_cache()
    return _room(device, 0, ranks)


def _room(device: torch.device, unused: int, ranks: int) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int((free - KEPT_FREE * total) / ranks + unused))


def cache_bytes(decoder: Decoder) -> int:
    """Bytes of the keys and values of one token on this stage."""
    return kv_bytes(decoder.spec, decoder.layout, decoder.coord.p, 1, decoder.dtype.itemsize)
