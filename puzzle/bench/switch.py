"""`puzzle bench switch`: seconds of the three strategies beside the least that the links allow."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puzzle.bench import device
from puzzle.cli import Parser
from puzzle.cli.plan_switch import model_spec, triple
from puzzle.engine.runtime import ModelRuntime
from puzzle.engine.switcher import Switcher
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.cluster import GB, Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.switch import MIB, SwitchPlan, plan_switch
from puzzle.plan.switch_route import STRATEGIES, Strategy

Pair = tuple[tuple[int, int, int], tuple[int, int, int]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class SwitchBench:
    """What is measured; `pairs` are (tp, pp, dp) before and after."""

    pairs: tuple[Pair, ...]
    model: str
    layers: int
    strategies: tuple[Strategy, ...]
    repeats: int
    staging_bytes: int
    rate_bytes: int
    gpus_per_node: int | None
    dtype: str
    device: str
    out: Path | None


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start as many processes as the layouts have."""
    parser = Parser("puzzle bench switch", description="Time switches of a model's layout.")
    parser.add_argument("--pairs", nargs="+", type=_pair, required=True, metavar="TP,PP,DP:TP,PP,DP")
    parser.add_argument("--model", default="7b", help="published size or Hugging Face folder")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep N decoder layers only")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--repeats", type=int, default=7, metavar="K", help="the median of K is reported")
    parser.add_argument("--staging-bytes", type=int, default=512 * MIB, metavar="BYTES")
    parser.add_argument("--rate-bytes", type=int, default=1024 * MIB, help="message that measures links")
    parser.add_argument("--gpus-per-node", type=int, default=None, metavar="N")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the results to FILE, one JSON per line")
    given = vars(parser.parse_args(arguments))
    given["pairs"], given["strategies"] = tuple(given["pairs"]), tuple(given["strategies"])
    bench = SwitchBench(**given)
    worlds = {tp * pp * dp for pair in bench.pairs for tp, pp, dp in pair}
    if len(worlds) > 1:
        raise UserError(f"--pairs: layouts of {sorted(worlds)} processes; give layouts of one size")
    if bench.repeats < 1:
        raise UserError(f"--repeats {bench.repeats}: at least 1")
    local.run("puzzle.bench.switch:work", (bench,), worlds.pop())
    return 0


def _pair(text: str) -> Pair:
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text}: write two layouts as 1,4,1:2,2,1")
    return triple(before), triple(after)


def work(bench: SwitchBench) -> None:
    """What every process does; rank 0 prints a line per switch as soon as it is measured."""
    with World.start(bench.device) as world:
        rate = link_rate(world, bench.rate_bytes)
        if world.rank == 0:
            disabled = os.environ.get("NCCL_P2P_DISABLE", "0")
            print(f"{bench.model} {bench.dtype}, {world.size} ranks on {device.facts(world)['device']},")
            print(f"links {rate / GB:.1f} GB/s per rank and direction, NCCL_P2P_DISABLE={disabled}")
            print(f"{'switch':>15} {'strategy':>11}  kept ms fresh ms floor ms  ratio     GB local  extra GB")
        for pair in bench.pairs:
            for row in _rows(bench, pair, world, rate):
                if world.rank == 0:
                    _report(bench, row)


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


def _rows(bench: SwitchBench, pair: Pair, world: World, rate: float) -> list[dict[str, Any]]:
    spec = model_spec(bench.model)
    spec = replace(spec, num_layers=bench.layers or spec.num_layers)
    source, destination = (Placement.default(Layout.even(*side, spec.num_layers)) for side in pair)
    dtype = DTYPES[bench.dtype]
    runtime = ModelRuntime("source", spec, source, world, dtype)
    runtime.freeze()
    initialise(runtime.decoder, 0)
    cluster = Cluster(bench.gpus_per_node or world.per_node)
    found = []
    for strategy in bench.strategies:
        start = time.perf_counter()
        plan = plan_switch(
            spec,
            source,
            destination,
            cluster,
            strategy=strategy,
            itemsize=dtype.itemsize,
            staging_bytes=bench.staging_bytes,
        )
        planning = time.perf_counter() - start
        measured = _measured(bench, plan, runtime, world)
        floor = max(max(plan.traffic(rank)) for rank in plan.ranks) / rate
        found.append(_row(bench, pair, plan, rate, floor) | measured | {"planning_seconds": planning})
    least = min(row["floor_seconds"] for row in found)
    return [row | {"least_floor_seconds": least} | device.facts(world) for row in found]


def _measured(bench: SwitchBench, plan: SwitchPlan, runtime: ModelRuntime, world: World) -> dict[str, Any]:
    """Seconds with memory kept between switches and with memory given back, and what memory they took."""
    numbers: dict[str, Any] = {}
    for name, keep in (("kept", True), ("fresh", False)):
        made = ModelRuntime(
            "destination", plan.spec, plan.destination, world, runtime.decoder.dtype, allocate=False
        )
        switcher = Switcher(plan, world, runtime.decoder, made.decoder, keep=keep)
        switcher.fill()
        switcher.verify()
        switcher.drop()
        device.reset_peak(world.device)
        free, used = _free(world), _allocated(world)
        times, drops = [], []
        for _ in range(bench.repeats):
            times += device.measure(world, switcher.fill, 1)
            drops += device.measure(world, switcher.drop, 1)
        numbers |= {f"{name}_seconds": statistics.median(times), f"{name}_all_seconds": times}
        if not keep:
            numbers["drop_seconds"] = statistics.median(drops)
            if world.device.type == "cuda":
                extra = torch.tensor(torch.cuda.max_memory_allocated(world.device) - used)
                lost = torch.tensor(free - _free(world))
                numbers["measured_extra_bytes"] = int(world.max(extra.to(world.device)))
                numbers["not_given_back_bytes"] = int(world.max(lost.to(world.device)))
    return numbers


def _free(world: World) -> int:
    """Free bytes by the device's own account; 0 on a CPU."""
    return torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else 0


def _allocated(world: World) -> int:
    return torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0


def _row(bench: SwitchBench, pair: Pair, plan: SwitchPlan, rate: float, floor: float) -> dict[str, Any]:
    return {
        "bench": "switch",
        "from": pair[0],
        "to": pair[1],
        "model": bench.model,
        "layers": plan.spec.num_layers,
        "dtype": bench.dtype,
        "strategy": plan.strategy,
        "bytes": plan.bytes_received,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "local_share": plan.local_share,
        "buckets": plan.num_buckets,
        "link_bytes_per_second": rate,
        "floor_seconds": floor,
        "peak_extra_bytes": max(plan.for_rank(rank).peak_extra for rank in plan.ranks),
        "nccl_p2p_disable": os.environ.get("NCCL_P2P_DISABLE"),
        "options": {
            k: v for k, v in asdict(bench).items() if k in ("repeats", "staging_bytes", "rate_bytes")
        },
        "hash": plan.hash,
    }


def _report(bench: SwitchBench, row: dict[str, Any]) -> None:
    layouts = "->".join(",".join(map(str, row[side])) for side in ("from", "to"))
    floor = row["least_floor_seconds"]
    ratio = f"{row['kept_seconds'] / floor:6.2f}" if floor else "     -"
    times = " ".join(f"{row[name] * 1e3:8.2f}" for name in ("kept_seconds", "fresh_seconds"))
    sizes = f"{row['bytes'] / GB:6.2f} {row['local_share']:5.0%} {row['peak_extra_bytes'] / GB:9.2f}"
    print(f"{layouts:>15} {row['strategy']:>11} {times} {floor * 1e3:8.2f} {ratio} {sizes}", flush=True)
    if bench.out is not None:
        with bench.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
