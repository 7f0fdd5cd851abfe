"""`puzzle bench switch`: the way from one layout of a model to another.

Times the three strategies beside the least that the links allow.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.bench import device, harness
from puzzle.bench.harness import Row, option
from puzzle.cli import whole
from puzzle.cli.plan_switch import triple
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.resharder import Resharder
from puzzle.engine.reshard.transports import Unreachable, open_peers
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_BYTES
from puzzle.plan.cluster import GB, Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import RankMemory, weight_bytes
from puzzle.plan.reshard.plan import MIB, SwitchPlan, Transport, plan_switch
from puzzle.plan.reshard.routing import STRATEGIES, Strategy

Pair = tuple[harness.Sizes, harness.Sizes]
STAGING = 512 * MIB
ALONE = "bench switch needs layouts of at least 2 processes: one alone has no links"
WAYS: list[tuple[Strategy, Transport]] = [*((way, "messages") for way in STRATEGIES), ("planned", "peer")]


def pair_of(text: str) -> Pair:
    """Two layouts from the command line."""
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text}: write two layouts as 1,4,1:2,2,1")
    return triple(before), triple(after)


@dataclass(frozen=True, kw_only=True)
class PairsBench(harness.ModelBench):
    """A measurement of a model between two layouts, that of training and that of generation."""

    pairs: Annotated[Sequence[Pair], option(nargs="+", type=pair_of, metavar="TP,PP,DP:TP,PP,DP")]
    repeats: harness.Repeats = 5
    timeout: ClassVar[float] = 60.0

    def layouts(self) -> Sequence[harness.Sizes]:
        return [sizes for pair in self.pairs for sizes in pair]

    def check(self) -> None:
        worlds = {math.prod(sizes) for sizes in self.layouts()}
        if len(worlds) > 1:
            raise UserError(f"--pairs: layouts of {sorted(worlds)} processes; give layouts of one size")
        super().check()

    def plan(self, pair: Pair, world: World, destination: Placement | None = None, **how: Any) -> SwitchPlan:
        """How a switch goes; `destination` by default in rank order."""
        before, after = (Placement.default(Layout.even(*side, self.spec.num_layers)) for side in pair)
        cluster, itemsize = Cluster(world.per_node), harness.DTYPES[self.dtype].itemsize
        return plan_switch(self.spec, before, destination or after, cluster, itemsize=itemsize, **how)


def ends_of(row: Row) -> str:
    """The layouts of a row, as its line begins."""
    return f"{'->'.join(','.join(map(str, row[side])) for side in ('from', 'to')):>15}"


class LayoutChange:
    """A model under the first layout of a pair that is filled into the second one."""

    def __init__(self, bench: PairsBench, pair: Pair, world: World) -> None:
        self.bench, self.pair, self.world, self.spec = bench, pair, world, bench.spec
        self.source = harness.random_model("source", self.spec, pair[0], world, bench.dtype)

    def plan(self, destination: Placement | None = None, **how: Any) -> SwitchPlan:
        """How this switch goes; `destination` by default in rank order."""
        return self.bench.plan(self.pair, self.world, destination, **how)

    def made(self, plan: SwitchPlan, **how: Any) -> tuple[Resharder, ModelRuntime]:
        """What makes the destination's parameters by that plan, and the model that they are made for."""
        dtype = harness.DTYPES[self.bench.dtype]
        made = ModelRuntime("made", self.spec, plan.destination, self.world, dtype, allocate=False)
        return Resharder(plan, self.world, self.source.decoder, made.decoder, **how), made

    def tried(self, row: Row, measured: Callable[[], Row]) -> Row:
        """The measurement, or why there is none: peers that cannot be read are no end of the rest."""
        row |= {"from": self.pair[0], "to": self.pair[1]}
        try:
            row |= measured()
        except UserError as error:
            row["error"] = str(error)
        tidy(self.world)
        return row


def tidy(world: World) -> None:
    """Once no rank reads it any more, memory that peers had opened can go."""
    gc.collect()
    device.meet(world)
    if world.device.type == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class SwitchBench(PairsBench):
    """Time switches of a model's layout."""

    repeats: harness.Repeats = 7
    rate_bytes: Annotated[int, option(type=whole(1, MOST_BYTES), help="to measure links with")] = 1 << 30

    smaller: ClassVar[Mapping[str, str]] = {
        "link": "lower --rate-bytes",
        **harness.Bench.smaller,
    }

    def check(self) -> None:
        super().check()
        if math.prod(self.pairs[0][0]) == 1:
            raise UserError(ALONE)

    def memory(self, world: World) -> RankMemory:
        """The model of the pair that needs most, what another strategy brought, and what is brought."""
        stages = {"links": {"bytes sent over a link": 2 * self.rate_bytes}}
        for pair in self.pairs:
            one = self.use("source", pair[0], world)
            coord = one.placement.coord_of(world.rank)
            parts = {
                way: self.plan(pair, world, strategy=way, staging_bytes=STAGING).for_rank(world.rank)
                for way in STRATEGIES
            }
            stages[ends_of({"from": pair[0], "to": pair[1]})] = {
                "source weights": weight_bytes(self.spec, one.placement.layout, coord, one.itemsize),
                "compared weights": one.itemsize * sum(param.size for param in parts["gather-all"].allocate),
                "weights and staging": max(part.peak_extra for part in parts.values()),
            }
        return RankMemory(world.rank, {}, stages)

    def measure(self, world: World) -> Iterator[Row | str]:
        rates = {"link_bytes_per_second": link_rate(world, self.rate_bytes)}
        try:
            rates["copy_bytes_per_second"] = copy_rate(world, self.rate_bytes)
            said = f"copies from a peer {rates['copy_bytes_per_second'] / GB:.1f} GB/s"
        except Unreachable as error:
            said = f"no copies from peers: {error}"
        tidy(world)
        yield (
            f"{self.model} {self.dtype}, {world.size} ranks on {device.facts(world)['device']},\n"
            f"links {rates['link_bytes_per_second'] / GB:.1f} GB/s per rank and direction, {said},\n"
            f"NCCL_P2P_DISABLE={os.environ.get('NCCL_P2P_DISABLE', '0')}\n"
            f"{'switch':>15} {'way':>13}  kept ms  drop ms fresh ms  drop ms floor ms  ratio     GB local"
            "  extra GB equal"
        )
        for pair in self.pairs:
            yield from _Switched(self, pair, world).rows(rates)
            tidy(world)

    def line(self, row: Row) -> str:
        line, floor = f"{ends_of(row)} {row['way']:>13}", row["least_floor_seconds"]
        if "error" in row:
            return f"{line} {row['error']}"
        ratio = f"{row['kept_seconds'] / floor:6.2f}" if floor else "     -"
        sizes = f"{row['bytes'] / GB:6.2f} {row['local_share']:5.0%} {row['peak_extra_bytes'] / GB:9.2f}"
        seconds = [row[f"{kind}_seconds"] for kind in ("kept", "kept_drop", "fresh", "fresh_drop")]
        times = " ".join(f"{1e3 * value:8.2f}" for value in (*seconds, floor))
        return f"{line} {times} {ratio} {sizes} {'yes' if row['equal'] else 'NO':>5}"


def link_rate(world: World, size: int) -> float:
    """Bytes per second that every rank sends to the next one while it receives from the one before."""
    group = world.groups([tuple(range(world.size))], "rate")
    if group is None:
        raise UserError(ALONE)
    outgoing, incoming = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def ring() -> None:
        sends = dist.P2POp(dist.isend, outgoing, right, group)
        for request in dist.batch_isend_irecv([sends, dist.P2POp(dist.irecv, incoming, left, group)]):
            request.wait()

    device.measure(world, ring, 3)
    return size / median(device.measure(world, ring, 9))


def copy_rate(world: World, size: int) -> float:
    """Bytes per second that every rank copies out of the memory of the one before. Unreachable: it cannot."""
    left = (world.rank - 1) % world.size
    ring = [((rank - 1) % world.size, rank) for rank in range(world.size)]
    have, target = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    value = open_peers(ring, world, {"": have})[left][""]
    device.measure(world, lambda: target.copy_(value), 3)
    return size / median(device.measure(world, lambda: target.copy_(value), 9))


class _Switched(LayoutChange):
    """Three strategies and two transports, their results compared with gather-all's."""

    def rows(self, rates: Row) -> Iterator[Row]:
        """One per way."""
        self.source.freeze()
        self.truth: tuple[Placement, list[Tensor]] | None = None
        least, rate = _most_traffic(self.plan(staging_bytes=STAGING)), rates["link_bytes_per_second"]
        for strategy, transport in WAYS:
            plan = self.plan(strategy=strategy, staging_bytes=STAGING)
            row: Row = {"way": strategy if transport == "messages" else f"{strategy}, {transport}"}
            row |= {"strategy": plan.strategy, "transport": transport, "hash": plan.hash}
            row |= {"bytes": plan.bytes_received, "lower_bound_bytes": plan.lower_bound_bytes}
            row |= {"local_share": plan.local_share, "nccl_p2p_disable": os.environ.get("NCCL_P2P_DISABLE")}
            row |= {"floor_seconds": _most_traffic(plan) / rate, "least_floor_seconds": least / rate}
            yield self.tried(row | rates, partial(self._measured, plan, transport))

    def _measured(self, plan: SwitchPlan, transport: Transport) -> Row:
        """Seconds as PPO needs them, then with memory that is given back to the device after each switch;
        how much memory that is."""
        world, cuda = self.world, self.world.device.type == "cuda"
        truth = self._reference(plan.destination)
        switcher, _ = self.made(plan, transport=transport)
        switcher.fill()
        wrong = sum(not torch.equal(a, b) for a, b in zip(truth, _weights(switcher), strict=True))
        numbers: Row = {"equal": not device.most(world, wrong)}
        numbers["peak_extra_bytes"] = int(device.most(world, switcher.part.peak_extra))
        switcher.drop()
        for kind in ("kept", "fresh"):
            device.reset_peak(world.device)
            free = torch.cuda.mem_get_info(world.device)[0] if cuda else 0
            fills, drops = self._times(switcher, fresh=kind == "fresh" and cuda)
            numbers |= {f"{kind}_seconds": median(fills), f"{kind}_all_seconds": fills}
            numbers[f"{kind}_drop_seconds"] = median(drops)
            if cuda:
                missing = free - torch.cuda.mem_get_info(world.device)[0]
                numbers["not_given_back_bytes"] = int(device.most(world, missing))
        return numbers

    def _times(self, switcher: Resharder, *, fresh: bool) -> tuple[list[float], list[float]]:
        """Of each fill and of each drop; the first ones do not count."""

        def drop() -> None:
            switcher.drop()
            if fresh:
                torch.cuda.empty_cache()

        fills, drops = [], []
        for _ in range(self.bench.repeats + 1):
            fills += device.measure(self.world, switcher.fill, 1)
            drops += device.measure(self.world, drop, 1)
        return fills[1:], drops[1:]

    def _reference(self, destination: Placement) -> list[Tensor]:
        """This rank's weights under `destination` by gather-all, whose checksums are those of the source."""
        if self.truth is None or self.truth[0] != destination:
            self.truth = None
            plan = self.plan(destination, strategy="gather-all", staging_bytes=STAGING)
            switcher, _ = self.made(plan)
            switcher.fill()
            switcher.verify()
            self.truth = (destination, list(_weights(switcher)))
        return self.truth[1]


def _most_traffic(plan: SwitchPlan) -> int:
    """Bytes of the busier direction of the busiest rank."""
    return max(max(plan.traffic(rank)) for rank in plan.ranks)


def _weights(switcher: Resharder) -> Iterator[Tensor]:
    assert switcher.destination is not None
    return (p.detach() for p in switcher.destination.parameters())
