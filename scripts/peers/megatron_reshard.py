"""Time Megatron-core's resharding of a LLaMA's weights, beside `puzzle bench switch`.

Plain modules with Megatron's names and attributes; the planner, executor and NCCL service of
megatron.core.resharding (PyPI: megatron-core, without its dependencies); as many ranks as layouts have:
    torchrun --nproc-per-node 2 scripts/peers/megatron_reshard.py 1,2,1:2,1,1 [--model 7b] [--out FILE]
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puzzle.bench import device
from puzzle.bench.switch import link_rate
from puzzle.cli.plan_switch import model_spec, triple
from puzzle.engine.runtime.world import World
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

try:
    from megatron.core import __version__  # ty: ignore[import-not-found]
    from megatron.core.resharding import (  # ty: ignore[import-not-found]
        build_centralized_reshard_plan,
        execute_reshard_plan,
    )
    from megatron.core.resharding.copy_services.nccl_copy_service import (  # ty: ignore[import-not-found]
        NCCLCopyService,
    )
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install --no-deps megatron-core==0.16.1") from None

Numbers = tuple[int, int, int]
Spread = tuple[tuple[int, ...], int | None, int]
"""Of a tensor: whole shape, the dimension that tensor ranks share (or None), blocks in it."""


def tensors(spec: ModelSpec, layers: range, first: bool, last: bool) -> dict[str, Spread]:
    """The parameters of a stage by Megatron's names, layers by their global numbers."""
    hidden, ffn, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    qkv = heads + 2 * spec.num_kv_heads * spec.head_dim
    found: dict[str, Spread] = {"embedding": ((spec.vocab_size, hidden), 0, 1)} if first else {}
    for layer in layers:
        found |= {
            f"layers.{layer}.linear_qkv": ((qkv, hidden), 0, 1),
            f"layers.{layer}.linear_proj": ((hidden, heads), 1, 1),
            f"layers.{layer}.linear_fc1": ((2 * ffn, hidden), 0, 2),
            f"layers.{layer}.linear_fc2": ((hidden, ffn), 1, 1),
            f"layers.{layer}.input_layernorm": ((hidden,), None, 1),
            f"layers.{layer}.pre_mlp_layernorm": ((hidden,), None, 1),
        }
    if last:
        found |= {"final_layernorm": ((hidden,), None, 1), "output_layer": ((spec.vocab_size, hidden), 0, 1)}
    return found


def part(name: str, spread: Spread, t: int, tp: int, place: torch.device) -> Tensor:
    """Tensor rank t's part of a matrix whose values tell their places."""
    shape, dim, blocks = spread
    value = (torch.arange(math.prod(shape), device=place) + sum(map(ord, name))).remainder(251)
    value = value.to(torch.bfloat16).view(shape)
    if dim is None:
        return value
    return torch.cat([block.chunk(tp, dim)[t] for block in value.chunk(blocks, dim)], dim)


def stage(spec: ModelSpec, placement: Placement, world: World, filled: bool) -> nn.Module:
    """This rank's parameters, with what Megatron's planner reads of modules and parameters."""
    layout, coord = placement.layout, placement.coord_of(world.rank)
    mine = layout.layers(coord.p)
    module, layers = nn.Module(), [nn.Module() for _ in mine]
    module.layers = nn.ModuleList(layers)
    for number, layer in zip(mine, layers, strict=True):
        vars(layer)["layer_number"] = number + 1
    for name, spread in tensors(spec, mine, coord.p == 0, coord.p == layout.pp - 1).items():
        value = part(name, spread, coord.t, layout.tp, world.device)
        holder = nn.Module()
        holder.weight = nn.Parameter(value if filled else torch.zeros_like(value), requires_grad=False)
        shared, dim, stride = spread[1] is not None, spread[1] or 0, spread[2]
        vars(holder.weight).update(tensor_model_parallel=shared, partition_dim=dim, partition_stride=stride)
        *path, leaf = name.split(".")
        (layers[int(path[1]) - mine[0]] if path else module).add_module(leaf, holder)
    groups = {}
    for kind in ("tp", "pp", "dp"):
        for ranks in placement.groups(kind):
            group = dist.new_group(list(ranks))
            groups |= {kind: group} if world.rank in ranks else {}
    vars(module)["pg_collection"] = SimpleNamespace(**groups)
    return module


def measured(spec: ModelSpec, before: Numbers, after: Numbers, world: World) -> dict[str, Any]:
    """Seconds of the slowest rank; `equal`: every parameter is what a fresh cut of the whole gives."""
    sides = [Placement.default(Layout.even(*numbers, spec.num_layers)) for numbers in (before, after)]
    source, target = stage(spec, sides[0], world, filled=True), stage(spec, sides[1], world, filled=False)
    plan, service = build_centralized_reshard_plan(source, target), NCCLCopyService()
    times = device.measure(world, lambda: execute_reshard_plan(plan, source, target, service), 9)[2:]
    truth = stage(spec, sides[1], world, filled=True).parameters()
    wrong = sum(not torch.equal(a, b) for a, b in zip(target.parameters(), truth, strict=True))
    equal = not int(world.sum(torch.tensor(wrong, device=world.device)))
    return {"equal": equal, "kept_seconds": statistics.median(times), "kept_all_seconds": times}


def pair_of(text: str) -> tuple[Numbers, Numbers]:
    """Two layouts. ArgumentTypeError for anything else."""
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two layouts, such as 1,4,1:2,2,1")
    return triple(before), triple(after)


def main() -> None:
    """One line per pair as soon as it is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="+", type=pair_of, metavar="TP,PP,DP:TP,PP,DP")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with World.start(timeout=60.0) as world:
        facts: dict[str, Any] = {
            "bench": "switch",
            "way": f"megatron-core {__version__}",
            "model": given.model,
        }
        facts |= {"link_bytes_per_second": link_rate(world, 1 << 28)} | device.facts(world)
        for before, after in given.pairs:
            row: dict[str, Any] = {**facts, "from": before, "to": after}
            row |= measured(model_spec(given.model), before, after, world)
            if world.rank == 0:
                told = f"{row['kept_seconds'] * 1e3:.2f} ms, equal: {row['equal']}"
                print(f"{before} -> {after} {row['way']} {told}", flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
