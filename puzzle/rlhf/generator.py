"""The actor as it generates: in its training layout, or with its weights switched to another one."""

from __future__ import annotations

import sys
from collections.abc import Generator as Lending
from contextlib import contextmanager
from typing import Any

import torch

from puzzle.config import TrainConfig
from puzzle.engine.runtime import ModelRuntime
from puzzle.engine.switcher import Switcher
from puzzle.engine.timing import StageClock
from puzzle.engine.world import World
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.switch import plan_switch
from puzzle.sources import layout_of


class Generator:
    """Lends the runtime that generates; `switcher` is None where that is the actor itself."""

    def __init__(self, runtime: ModelRuntime, switcher: Switcher | None = None, verify: bool = False) -> None:
        self.runtime, self.switcher, self.verify = runtime, switcher, verify
        self._seconds = (0.0, 0.0)

    @contextmanager
    def weights(self, clock: StageClock | None = None) -> Lending[ModelRuntime]:
        """The runtime, with its weights for as long as the block lasts; time goes to the clock's stages."""
        clock_ends = clock.end if clock is not None else lambda stage: None
        if self.switcher is None:
            yield self.runtime
            clock_ends("generation")
            return
        fill = self.switcher.fill()
        clock_ends("switch")
        if self.verify:
            self.switcher.verify()
            clock_ends("other")
        yield self.runtime
        clock_ends("generation")
        self._seconds = (fill, self.switcher.drop())
        clock_ends("switch")

    def record(self, world: World) -> dict[str, Any] | None:
        """Fields of the `switch` record of the last use, None without a switch; call on every rank.

        Bytes are of all ranks together, `gbs_per_rank` the larger direction of each rank over the fill.
        """
        if self.switcher is None:
            return None
        plan = self.switcher.plan
        fill, drop = world.max(torch.tensor(self._seconds, dtype=torch.float64, device=world.device)).tolist()
        return {
            "seconds": fill + drop,
            "fill_seconds": fill,
            "drop_seconds": drop,
            "bytes": plan.bytes_received,
            "lower_bound_bytes": plan.lower_bound_bytes,
            "local_share": plan.local_share,
            "gbs_per_rank": [max(plan.traffic(rank)) / fill / 1e9 for rank in plan.ranks],
            "peak_bytes": max(plan.for_rank(rank).peak_extra for rank in plan.ranks),
            "strategy": plan.strategy,
            "transport": plan.transport,
            "hash": plan.hash,
        }


def build_generator(config: TrainConfig, world: World, actor: ModelRuntime) -> Generator:
    """What `generation.layout` and `switch` ask for. UserError for a layout that the model cannot have."""
    spec, source, options = actor.spec, actor.placement, config.switch
    layout = layout_of("generation", config.generation.layout, spec)
    if options.nest:
        layout = Layout.nested(layout.tp, layout.pp, layout.dp, source.layout)
    if layout == source.layout:
        return Generator(actor)
    dtype = actor.decoder.dtype
    plan = plan_switch(
        spec,
        source,
        Placement.default(layout),
        Cluster(options.gpus_per_node or world.per_node),
        strategy=options.strategy,
        itemsize=dtype.itemsize,
        staging_bytes=options.staging_bytes,
    )
    runtime = ModelRuntime("generation", spec, plan.destination, world, dtype, allocate=False)
    switcher = Switcher(plan, world, actor.decoder, runtime.decoder, transport=options.transport)
    if switcher.declined is not None and world.rank == 0:
        print(f"switch: messages instead of peer copies: {switcher.declined}", file=sys.stderr)
    return Generator(runtime, switcher, options.verify)
