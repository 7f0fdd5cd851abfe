"""What a rank refuses before models are loaded or replaced, and how it gives a run up."""

from __future__ import annotations

import os
from pathlib import Path

from puzzle.config import memory_report as footprint
from puzzle.config.resolve import Plan
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.runlog import folders

SKIPS_MEMORY_CHECK = "launch.skip_memory_check"
"""The key by which a run begins that a refusal of memory names; whatever runs `check_memory` takes it."""


def agree(plan: Plan, world: World) -> None:
    """All ranks made the same plan, or the run would hang later: UserError with what differs."""
    hashes = world.gather(plan.hash)
    if len(set(hashes)) > 1:
        odd = next(rank for rank, found in enumerate(hashes) if found != hashes[0])
        raise UserError(
            f"rank {odd} resolved the run to plan {hashes[odd]}, rank 0 to {hashes[0]}: their hosts"
            " see different model folders; give all the same files"
        )


def check_memory(plan: Plan, world: World) -> None:
    """Refuse what cannot fit before anything is loaded; warn of it under `launch.skip_memory_check`."""
    skip = plan.config.launch.skip_memory_check
    with footprint.unless_skipped(skip, f"--{SKIPS_MEMORY_CHECK} true", world.warn):
        if (limit := world.device_memory) is not None:
            footprint.require(footprint.estimate(plan, True, limit), limit)
        elif (free := world.free_memory()) is not None:
            footprint.require(footprint.estimate(plan, False), free.bytes, free.told)


def refuse_replacing(checkpoints: Path, world: World) -> None:
    """Models stay where a run would begin again; the same refusal on every rank."""
    refusal = None
    if world.rank == 0:
        try:
            folders.refuse_replacing(checkpoints)
        except UserError as error:
            refusal = error
    if (refusal := world.share(refusal)) is not None:
        raise refusal


def give_up(line: str) -> None:
    """Ends the run from the rank whose reward function does not let itself be ended."""
    local.report(line, True, "user")
    os._exit(2)
