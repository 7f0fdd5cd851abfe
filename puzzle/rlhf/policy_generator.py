"""The actor as it generates: in its training layout, or with its weights switched to another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from puzzle.config import memory_report as footprint
from puzzle.config.resolve import RunPlan
from puzzle.engine.generate.model_runner import ModelRunner, Room
from puzzle.engine.generate.peers import share_sums
from puzzle.engine.pipeline.model import ModelRuntime, borrower
from puzzle.engine.reshard.resharder import Resharder
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.tracing import Instant
from puzzle.engine.runtime.world import World
from puzzle.engine.train.offload import HostMemory, MergedAdapters
from puzzle.engine.train.zero_adamw import ZeroAdamW
from puzzle.errors import UserError
from puzzle.plan.reshard.plan import gathered_bytes
from puzzle.runlog.records import Switch


class PolicyGenerator:
    """Lends the runtime that generates; `switcher` is None where its weights are those of the actor. In a
    `with` block: at its end nothing of generation stays.

    `merged` adds the actor's adapters to its weights beforehand, and puts these back afterwards:

        base W --keep--> host
        W + scale B A --(switch)--> generation
        W <--restore-- host

    With a plan out of ZeRO shards, what the last step of an iteration changed is gathered beside generation;
    `saved_bytes` need not have arrived before it, of all ranks together.
    """

    def __init__(
        self,
        actor: ModelRuntime,
        runtime: ModelRuntime | None = None,
        switcher: Resharder | None = None,
        verify: bool = False,
        saved_bytes: int = 0,
        merged: MergedAdapters | None = None,
        graphs: bool = True,
        room: Room | None = None,
    ) -> None:
        """`graphs` and `room` as in `ModelRunner`."""
        self.actor, self.runtime, self.switcher, self.verify = actor, runtime or actor, switcher, verify
        self.saved_bytes, self.merged = saved_bytes, merged
        self._seconds = (0.0, 0.0, 0.0)  # of the fill, awaited of it, of the drop
        self._waits: list[tuple[Instant, Instant]] = []
        self._graphs, self._room = graphs, room
        self._passes: ModelRunner | None = None

    @property
    def passes(self) -> ModelRunner:
        """What runs the runtime's passes; while it has its weights."""
        if self._passes is None:
            self._passes = ModelRunner(self.runtime.decoder, self._graphs, room=self._room)
        return self._passes

    def __enter__(self) -> PolicyGenerator:
        """As long as the block lasts."""
        return self

    def __exit__(self, *_: object) -> None:
        """A communicator never ends while a graph holds its collectives."""
        if self._passes is not None:
            self._passes.release()

    @property
    def _optimizer(self) -> ZeroAdamW:
        assert self.actor.optimizer is not None
        return self.actor.optimizer

    def before_last_step(self) -> None:
        """The actor's next optimizer step is the last one before it generates."""
        self._optimizer.defer_gather = self.switcher is not None and self.switcher.plan.zero

    def end_training(self) -> None:
        """Await the actor's weights, unless generation does without the other replicas' rows."""
        self._optimizer.defer_gather = False
        if self.switcher is not None and not self._optimizer.gather_pending:
            self._await_weights()

    def _await_weights(self) -> None:
        device = self.actor.world.device
        began = Instant(device)
        self._optimizer.wait_gather()
        self._waits.append((began, Instant(device)))

    @contextmanager
    def weights(self, clock: StageClock | None = None) -> Generator[ModelRuntime]:
        """The runtime, with its weights for as long as the block lasts; time goes to the clock's stages."""
        clock_ends = clock.end if clock is not None else lambda stage: None
        if self.merged is not None:
            self._optimizer.wait_gather()
            self.merged.merge()
            clock_ends("switch")
        if self.switcher is None:
            yield self.runtime
            self.passes.rest()
            clock_ends("generation")
        else:
            yield from self._switched(self.switcher, clock_ends)
        if self.merged is not None:
            self.merged.restore()
            clock_ends("switch")

    def _switched(self, switcher: Resharder, clock_ends: Callable[[str], None]) -> Iterator[ModelRuntime]:
        fill = switcher.fill()
        if switcher.side is None:
            clock_ends("switch")
        if self.verify:
            self._await_weights()
            switcher.verify()
            clock_ends("other")
        self._optimizer.start_gather()
        yield self.runtime
        self.passes.rest()
        clock_ends("generation")
        drop = switcher.drop()
        self._await_weights()
        clock_ends("switch")
        self._seconds = (fill, fill, drop)
        if switcher.side is not None:
            whole, waited = switcher.take_times()
            self._seconds = (whole, fill + waited, drop)

    def record(self, world: World, iteration: int) -> Switch | None:
        """The switches of an iteration, None without any; call on every rank.

        Bytes are of all ranks together, `gbs_per_rank` the larger direction of each rank over the fill.
        """
        if self.switcher is None:
            return None
        plan = self.switcher.plan
        gathered = gathered_bytes(self.actor.spec, self.actor.placement, plan.itemsize)
        own = (*self._seconds, sum(end - began for began, end in self._waits))
        self._waits.clear()
        most = world.max(torch.tensor(own, dtype=torch.float64, device=world.device)).tolist()
        fill, awaited, drop, gather = most
        fields = {
            "fill_seconds": fill,
            "awaited_seconds": awaited,
            "drop_seconds": drop,
            "filled_from": "shards" if plan.zero else "gathered",
            "gather_seconds": gather,
            "gather_bytes": sum(gathered.values()),
            "saved_bytes": self.saved_bytes,
            "bytes": plan.bytes_received,
            "lower_bound_bytes": plan.lower_bound_bytes,
            "local_share": plan.local_share,
            "gbs_per_rank": [max(plan.traffic(rank)) / fill / 1e9 for rank in plan.ranks],
            "peak_bytes": max(plan.for_rank(rank).peak_extra for rank in plan.ranks),
            "strategy": plan.strategy,
            "transport": plan.transport,
            "hash": plan.hash,
        }
        return Switch(iteration, awaited + drop + (gather if plan.zero else 0.0), fields=fields)


def build_policy_generator(
    plan: RunPlan, world: World, actor: ModelRuntime, host: HostMemory
) -> PolicyGenerator:
    """What `generation.layout` and `switch` ask for. UserError where the device cannot do it."""
    options, request = plan.config.switch, plan.switch
    merged = MergedAdapters(host, actor.stage) if plan.merges else None
    beside = options.overlap == "prefill"
    if world.device.type != "cuda" and plan.config.keeps_graphs is True:
        raise UserError("generation.keep_graphs: there is no GPU here, and a CPU has no graphs; use auto")
    if world.device.type != "cuda" and request is not None and beside:
        raise UserError("switch.overlap prefill: there is no GPU here, and a CPU does one thing at a time")
    room = room_of(plan, world)
    make = partial(PolicyGenerator, merged=merged, graphs=plan.config.generation.graphs, room=room)
    if request is None:
        lent = borrower("generation", plan.generation_spec, actor) if plan.merges else actor
        _share_sums(plan, lent)
        return make(actor, lent)
    switch = request.plan
    runtime = ModelRuntime(
        "generation",
        plan.generation_spec,
        switch.destination,
        world,
        actor.decoder.dtype,
        parts=plan.config.parts,
        allocate=False,
    )
    switcher = Resharder(
        switch,
        world,
        actor.decoder,
        runtime.decoder,
        transport=options.transport,
        beside=beside,
        keep=room.pages > 0,
    )
    if switcher.declined is not None and world.rank == 0:
        print(f"switch: messages instead of peer copies: {switcher.declined}", file=sys.stderr)
    _share_sums(plan, runtime)
    return make(actor, runtime, switcher, options.verify, request.saved_bytes)


def _share_sums(plan: RunPlan, runtime: ModelRuntime) -> None:
    """What `generation.tp_sums` asks for."""
    wanted = plan.config.generation.tp_sums
    declined = share_sums(runtime, wanted)
    if declined is not None and wanted == "peer":
        raise UserError(f"generation.tp_sums peer: {declined}; use auto or collective")
    if declined is not None and runtime.world.rank == 0:
        print(f"generation: collectives sum in decode passes: {declined}", file=sys.stderr)


def room_of(plan: RunPlan, world: World) -> Room:
    """What sequences of full length take on this rank; its pages stay if every rank has memory for that."""
    cuda = world.device.type == "cuda"
    cache = footprint.estimate(plan, cuda, world.device_memory)[world.rank].cache
    assert cache is not None
    lacks = torch.tensor(int(not cache.kept), device=world.device)
    return Room(cache.rows, cache.columns, 0 if int(world.max(lacks)) else cache.pages - 1)
