"""Time Megatron-core's resharding of a LLaMA's weights, beside `puzzle bench switch`.

Plain modules with Megatron's names and attributes; the planner, executor and NCCL service of
megatron.core.resharding (PyPI package megatron-core, without its dependencies):
    torchrun --nproc-per-node 4 scripts/peers_megatron_reshard.py 1,4,1:2,2,1 [--model 7b] [--out FILE]
"""

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__  # ty: ignore[import-not-found]
from megatron.core.resharding import (  # ty: ignore[import-not-found]
    build_centralized_reshard_plan,
    execute_reshard_plan,
)
from megatron.core.resharding.copy_services.nccl_copy_service import (  # ty: ignore[import-not-found]
    NCCLCopyService,
)
from torch import Tensor, nn

from puzzle.bench import device
from puzzle.bench.switch import link_rate
from puzzle.cli.plan_switch import model_spec, triple
from puzzle.engine.world import World
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec


def whole(name: str, shape: tuple[int, ...], place: torch.device) -> Tensor:
    """Values of a whole matrix that name their place in it."""
    numbers = torch.arange(shape[0], device=place).view(-1, *[1] * (len(shape) - 1)) * 31
    if len(shape) > 1:
        numbers = numbers + torch.arange(shape[1], device=place)
    return ((numbers + sum(map(ord, name))) % 251).to(torch.bfloat16).expand(shape)


def tensors(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], int | None, int]]:
    """Megatron's name (layers by global number): whole shape, partitioned dimension, stride."""
    hidden, ffn, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    found: dict[str, tuple[tuple[int, ...], int | None, int]] = {
        "embedding.weight": ((spec.vocab_size, hidden), 0, 1),
        "final_layernorm.weight": ((hidden,), None, 1),
        "output_layer.weight": ((spec.vocab_size, hidden), 0, 1),
    }
    qkv = heads + 2 * spec.num_kv_heads * spec.head_dim
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        found[at + "linear_qkv.weight"] = ((qkv, hidden), 0, 1)
        found[at + "linear_proj.weight"] = ((hidden, heads), 1, 1)
        found[at + "linear_fc1.weight"] = ((2 * ffn, hidden), 0, 2)
        found[at + "linear_fc2.weight"] = ((hidden, ffn), 1, 1)
        found[at + "input_layernorm.weight"] = found[at + "pre_mlp_layernorm.weight"] = ((hidden,), None, 1)
    return found


def shard(value: Tensor, dim: int | None, stride: int, t: int, tp: int) -> Tensor:
    """Tensor rank t's part: of each of `stride` blocks its slice."""
    if dim is None:
        return value
    return torch.cat([block.chunk(tp, dim)[t] for block in value.chunk(stride, dim)], dim)


def stage(spec: ModelSpec, placement: Placement, world: World, filled: bool) -> nn.Module:
    """This rank's parameters, with what Megatron's planner reads of modules and parameters."""
    layout, coord = placement.layout, placement.coord_of(world.rank)
    module, mine = nn.Module(), {str(n): i for i, n in enumerate(layout.layers(coord.p))}
    layers = [nn.Module() for _ in mine]
    module.layers = nn.ModuleList(layers)
    for number, i in mine.items():
        vars(layers[i])["layer_number"] = int(number) + 1
    for name, (shape, dim, stride) in tensors(spec).items():
        parts = name.split(".")
        ends = {"embedding": 0, "final_layernorm": layout.pp - 1, "output_layer": layout.pp - 1}
        if (parts[0] == "layers" and parts[1] not in mine) or ends.get(parts[0], coord.p) != coord.p:
            continue
        home = layers[mine[parts[1]]] if parts[0] == "layers" else module
        value = shard(whole(name, shape, world.device), dim, stride, coord.t, layout.tp)
        holder = nn.Module()
        weight = nn.Parameter(value.clone() if filled else torch.zeros_like(value), requires_grad=False)
        vars(weight).update(
            tensor_model_parallel=dim is not None, partition_dim=dim or 0, partition_stride=stride
        )
        holder.weight = weight
        home.add_module(parts[-2], holder)
    groups = {}
    for kind in ("tp", "pp", "dp"):
        for ranks in placement.groups(kind):
            group = dist.new_group(list(ranks))
            groups |= {kind: group} if world.rank in ranks else {}
    vars(module)["pg_collection"] = SimpleNamespace(**groups)
    return module


def measured(spec: ModelSpec, pair: str, world: World) -> dict[str, Any]:
    """Seconds of the slowest rank; `equal`: every parameter is what a fresh cut of the whole gives."""
    before, after = (Placement.default(Layout.even(*triple(s), spec.num_layers)) for s in pair.split(":"))
    source, target = stage(spec, before, world, filled=True), stage(spec, after, world, filled=False)
    plan, service = build_centralized_reshard_plan(source, target), NCCLCopyService()
    times = device.measure(world, lambda: execute_reshard_plan(plan, source, target, service), 9)[2:]
    truth = stage(spec, after, world, filled=True).parameters()
    wrong = sum(not torch.equal(a, b) for a, b in zip(target.parameters(), truth, strict=True))
    equal = not int(world.sum(torch.tensor(wrong, device=world.device)))
    return {"pair": pair, "equal": equal, "kept_seconds": statistics.median(times), "kept_all_seconds": times}


def main() -> None:
    """One line per pair as soon as it is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="+", metavar="TP,PP,DP:TP,PP,DP")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with World.start("cuda", timeout=60.0) as world:
        row: dict[str, Any] = {"bench": "switch", "way": f"megatron-core {__version__}", "model": given.model}
        row |= {"link_bytes_per_second": link_rate(world, 1 << 30)} | device.facts(world)
        for pair in given.pairs:
            row |= measured(model_spec(given.model), pair, world)
            if world.rank == 0:
                line = f"{pair} {row['way']} {row['kept_seconds'] * 1e3:.2f} ms, equal: {row['equal']}"
                print(line, flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
