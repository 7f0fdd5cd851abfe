"""`puzzle bench switch`: seconds of the three strategies beside the least that the links allow."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.bench import device
from puzzle.bench.arguments import DTYPES, ModelBench, cut, parser
from puzzle.cli import whole
from puzzle.cli.plan_switch import triple
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.resharder import Resharder, lends_pages
from puzzle.engine.reshard.transports import LANES, Unreachable, open_peers
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_BYTES
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.cluster import GB, Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import MIB, SwitchPlan, Transport, plan_switch
from puzzle.plan.reshard.routing import STRATEGIES, Strategy

Pair = tuple[tuple[int, int, int], tuple[int, int, int]]
SECONDS = 60.0  # no rank waits longer for another


WAYS: tuple[tuple[Strategy, Transport], ...] = (
    *((strategy, "messages") for strategy in STRATEGIES),
    ("planned", "peer"),
)


@dataclass(frozen=True, kw_only=True)
class SwitchBench(ModelBench):
    """What is measured; `pairs` are (tp, pp, dp) before and after."""

    pairs: Sequence[Pair]
    repeats: int
    staging_bytes: int
    rate_bytes: int
    gpus_per_node: int | None


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start as many processes as the layouts have."""
    made = parser("switch", "Time switches of a model's layout.", "model layers repeats", repeats=7)
    made.add_argument("--pairs", nargs="+", type=pair_of, required=True, metavar="TP,PP,DP:TP,PP,DP")
    made.add_argument("--staging-bytes", type=whole(1, MOST_BYTES), default=512 * MIB, metavar="BYTES")
    made.add_argument(
        "--rate-bytes", type=whole(1, MOST_BYTES), default=1024 * MIB, help="message that measures links"
    )
    made.add_argument("--gpus-per-node", type=whole(1), default=None, metavar="N")
    bench = SwitchBench(**vars(made.parse_args(arguments)))
    processes = one_size(bench.pairs)
    cut(bench.model, bench.layers, [layout for pair in bench.pairs for layout in pair])
    local.run("puzzle.bench.switch:work", (bench,), processes)
    return 0


def one_size(pairs: Sequence[Pair]) -> int:
    """Processes of every layout. UserError if they differ."""
    worlds = {tp * pp * dp for pair in pairs for tp, pp, dp in pair}
    if len(worlds) > 1:
        raise UserError(f"--pairs: layouts of {sorted(worlds)} processes; give layouts of one size")
    return worlds.pop()


def pair_of(text: str) -> Pair:
    """Two layouts from the command line."""
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text}: write two layouts as 1,4,1:2,2,1")
    return triple(before), triple(after)


def work(bench: SwitchBench) -> None:
    """What every process does; rank 0 prints a line per switch as soon as it is measured."""
    with World.start(bench.device, timeout=SECONDS) as world:
        rates = {"link_bytes_per_second": link_rate(world, bench.rate_bytes)}
        try:
            rates["copy_bytes_per_second"] = copy_rate(world, bench.rate_bytes)
            said = f"copies from a peer {rates['copy_bytes_per_second'] / GB:.1f} GB/s"
        except Unreachable as error:
            said = f"no copies from peers: {error}"
        tidy(world)
        if world.rank == 0:
            disabled = os.environ.get("NCCL_P2P_DISABLE", "0")
            print(f"{bench.model} {bench.dtype}, {world.size} ranks on {device.facts(world)['device']},")
            print(f"links {rates['link_bytes_per_second'] / GB:.1f} GB/s per rank and direction, {said},")
            print(f"NCCL_P2P_DISABLE={disabled}")
            print(
                f"{'switch':>15} {'way':>13}  kept ms  drop ms fresh ms  drop ms floor ms  ratio     GB local"
                "  extra GB equal"
            )
        for pair in bench.pairs:
            subject = _Subject(bench, pair, world)
            for way in WAYS:
                row = subject.row(*way, rates)
                if world.rank == 0:
                    _report(bench, row)
            del subject
            tidy(world)


def link_rate(world: World, size: int) -> float:
    """Bytes per second that every rank sends to the next one while it receives from the one before."""
    group = world.groups([tuple(range(world.size))], "rate")
    if group is None:
        raise UserError("bench switch needs layouts of at least 2 processes: one alone has no links")
    outgoing, incoming = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def ring() -> None:
        sends = dist.P2POp(dist.isend, outgoing, right, group)
        for request in dist.batch_isend_irecv([sends, dist.P2POp(dist.irecv, incoming, left, group)]):
            request.wait()

    device.measure(world, ring, 3)
    return size / statistics.median(device.measure(world, ring, 9))


def copy_rate(world: World, size: int) -> float:
    """Bytes per second that every rank copies out of the memory of the one before. Unreachable: it cannot."""
    left = (world.rank - 1) % world.size
    ring = [((rank - 1) % world.size, rank) for rank in range(world.size)]
    have, target = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    value = open_peers(ring, world, {"": have})[left][""]
    device.measure(world, lambda: target.copy_(value), 3)
    return size / statistics.median(device.measure(world, lambda: target.copy_(value), 9))


def tidy(world: World) -> None:
    """Once no rank reads it any more, memory that peers had opened can go."""
    gc.collect()
    device.meet(world)
    if world.device.type == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


class _Subject:
    """A model under the first layout of a pair, switched to the second one in several ways."""

    def __init__(self, bench: SwitchBench, pair: Pair, world: World) -> None:
        self.bench, self.pair, self.world = bench, pair, world
        self.spec = bench.spec
        self.sides = [Placement.default(Layout.even(*side, self.spec.num_layers)) for side in pair]
        self.runtime = ModelRuntime("source", self.spec, self.sides[0], world, DTYPES[bench.dtype])
        self.runtime.freeze()
        initialise(self.runtime.decoder, 0)
        best = self.plan("planned")
        self.least = max(max(best.traffic(rank)) for rank in best.ranks)
        self._truth: tuple[Placement, list[Tensor]] | None = None

    def plan(self, strategy: Strategy, destination: Placement | None = None) -> SwitchPlan:
        """How this switch goes; `destination` by default in rank order."""
        return plan_switch(
            self.spec,
            self.sides[0],
            destination or self.sides[1],
            Cluster(self.bench.gpus_per_node or self.world.per_node),
            strategy=strategy,
            itemsize=DTYPES[self.bench.dtype].itemsize,
            staging_bytes=self.bench.staging_bytes,
        )

    def switcher(self, plan: SwitchPlan, transport: Transport) -> Resharder:
        """Makes the destination's parameters by that plan."""
        made = ModelRuntime(
            "destination", plan.spec, plan.destination, self.world, DTYPES[self.bench.dtype], allocate=False
        )
        return Resharder(plan, self.world, self.runtime.decoder, made.decoder, transport=transport)

    def row(self, strategy: Strategy, transport: Transport, rates: dict[str, float]) -> dict[str, Any]:
        """The measurement, or why there is none: peers that cannot be read are no end of the rest."""
        start = time.perf_counter()
        plan = self.plan(strategy)
        planning = time.perf_counter() - start
        rate = rates["link_bytes_per_second"]
        row = {
            "way": strategy if transport == "messages" else f"{strategy}, {transport}",
            "from": self.pair[0],
            "to": self.pair[1],
            "strategy": plan.strategy,
            "transport": transport,
            "lanes": LANES,
            "lends_pages": lends_pages(),
            "bytes": plan.bytes_received,
            "lower_bound_bytes": plan.lower_bound_bytes,
            "local_share": plan.local_share,
            "buckets": plan.num_buckets,
            **rates,
            "floor_seconds": max(max(plan.traffic(rank)) for rank in plan.ranks) / rate,
            "least_floor_seconds": self.least / rate,
            "planning_seconds": planning,
            "nccl_p2p_disable": os.environ.get("NCCL_P2P_DISABLE"),
            "hash": plan.hash,
        }
        try:
            row |= self._measured(plan, transport)
        except UserError as error:
            row["error"] = str(error)
        tidy(self.world)
        return row | {"where": device.facts(self.world)}

    def _measured(self, plan: SwitchPlan, transport: Transport) -> dict[str, Any]:
        """Seconds as PPO needs them, then with memory that is given back to the device after each switch;
        how much memory that is."""
        world = self.world
        truth = self._reference(plan.destination)
        switcher = self.switcher(plan, transport)
        switcher.fill()
        wrong = sum(not torch.equal(a, b) for a, b in zip(truth, _weights(switcher), strict=True))
        numbers: dict[str, Any] = {"equal": not self._most(wrong)}
        numbers["peak_extra_bytes"] = self._most(switcher.part.peak_extra)
        switcher.drop()
        for kind in ("kept", "fresh"):
            device.reset_peak(world.device)
            free, used = _free(world), _allocated(world)
            fills, drops = self._times(switcher, fresh=kind == "fresh")
            numbers |= {f"{kind}_seconds": statistics.median(fills), f"{kind}_all_seconds": fills}
            numbers[f"{kind}_drop_seconds"] = statistics.median(drops)
        if world.device.type == "cuda":
            numbers["measured_extra_bytes"] = self._most(torch.cuda.max_memory_allocated(world.device) - used)
            numbers["not_given_back_bytes"] = self._most(free - _free(world))
        return numbers

    def _most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.world.max(torch.tensor(number, device=self.world.device)))

    def _times(self, switcher: Resharder, *, fresh: bool = False) -> tuple[list[float], list[float]]:
        """Of each fill and of each drop; the first ones do not count."""

        def drop() -> None:
            switcher.drop()
            if fresh and self.world.device.type == "cuda":
                torch.cuda.empty_cache()

        fills, drops = [], []
        for _ in range(self.bench.repeats + 1):
            fills += device.measure(self.world, switcher.fill, 1)
            drops += device.measure(self.world, drop, 1)
        return fills[1:], drops[1:]

    def _reference(self, destination: Placement) -> list[Tensor]:
        """This rank's weights under `destination` by gather-all, whose checksums are those of the source."""
        if self._truth is None or self._truth[0] != destination:
            self._truth = None
            plan = self.plan("gather-all", destination)
            switcher = self.switcher(plan, "messages")
            switcher.fill()
            switcher.verify()
            self._truth = (destination, list(_weights(switcher)))
        return self._truth[1]


def _weights(switcher: Resharder) -> Iterator[Tensor]:
    assert switcher.destination is not None
    return (p.detach() for p in switcher.destination.parameters())


def _free(world: World) -> int:
    """Free bytes by the device's own account; 0 on a CPU."""
    return torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else 0


def _allocated(world: World) -> int:
    return torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0


def _report(bench: SwitchBench, row: dict[str, Any]) -> None:
    layouts = "->".join(",".join(map(str, row[side])) for side in ("from", "to"))
    line, floor = f"{layouts:>15} {row['way']:>13}", row["least_floor_seconds"]
    if "error" in row:
        print(f"{line} {row['error']}", flush=True)
    else:
        ratio = f"{row['kept_seconds'] / floor:6.2f}" if floor else "     -"
        sizes = f"{row['bytes'] / GB:6.2f} {row['local_share']:5.0%} {row['peak_extra_bytes'] / GB:9.2f}"
        equal = "yes" if row["equal"] else "NO"
        seconds = [row[f"{kind}_seconds"] for kind in ("kept", "kept_drop", "fresh", "fresh_drop")]
        times = " ".join(f"{1e3 * value:8.2f}" for value in (*seconds, floor))
        print(f"{line} {times} {ratio} {sizes} {equal:>5}", flush=True)
    bench.leave("switch", row)
