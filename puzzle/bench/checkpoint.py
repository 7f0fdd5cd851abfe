"""`puzzle bench checkpoint`: seconds of a training step alone and while a checkpoint is being written."""

from __future__ import annotations

import json
import shutil
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puzzle.bench import device
from puzzle.bench.texts import mean_loss, microbatches
from puzzle.bench.train import DTYPES, read_layout
from puzzle.cli import Parser
from puzzle.engine.checkpoint import Checkpoints
from puzzle.engine.optimizer import AdamWSettings
from puzzle.engine.runtime import ModelRuntime
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan import manifest
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.published import PUBLISHED, published


@dataclass(frozen=True)
class CheckpointBench:
    """What is measured; checkpoints are written to, and removed from, a new `folder`."""

    folder: Path
    model: str
    layers: int
    layout: tuple[int, int, int]
    rows: int
    length: int
    microbatches: int
    recompute: bool
    saves: int
    repeats: int
    dtype: str
    device: str
    out: Path | None


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    parser = Parser(
        "puzzle bench checkpoint", description="Time training steps while a checkpoint is written."
    )
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to be measured")
    parser.add_argument("--model", default="350m", choices=sorted(PUBLISHED), help="published size")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep N decoder layers only")
    parser.add_argument("--layout", default="1,1,1", metavar="TP,PP,DP")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=4, metavar="M", help="per replica and step")
    parser.add_argument("--recompute", action="store_true", help="keep only layer inputs for the backward")
    parser.add_argument("--saves", type=int, default=3, metavar="K", help="checkpoints after the first one")
    parser.add_argument("--repeats", type=int, default=9, metavar="K", help="steps without a save")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the result to FILE, one JSON per line")
    given = vars(parser.parse_args(arguments))
    given["layout"] = read_layout(given["layout"])
    bench = CheckpointBench(**given)
    if bench.folder.exists():
        raise UserError(f"--folder {bench.folder}: exists already; name a new one, it will be removed")
    if min(bench.saves, bench.repeats) < 1:
        raise UserError("--saves and --repeats: at least 1")
    tp, pp, dp = bench.layout
    local.run("puzzle.bench.checkpoint:work", (bench,), tp * pp * dp)
    return 0


def work(bench: CheckpointBench) -> None:
    """What every process does; rank 0 reports. RuntimeError if a file differs from what was there."""
    with World.start(bench.device) as world:
        row = measured(bench, world)
        if world.rank == 0:
            shutil.rmtree(bench.folder)
            _report(bench, row)


def measured(bench: CheckpointBench, world: World) -> dict[str, Any]:
    """Seconds of steps alone and during saves, and what the saves took."""
    spec = published(bench.model)
    spec = replace(spec, num_layers=bench.layers or spec.num_layers)
    placement = Placement.default(Layout.even(*bench.layout, spec.num_layers))
    runtime = ModelRuntime("model", spec, placement, world, DTYPES[bench.dtype], bench.recompute)
    initialise(runtime.decoder, 0)
    runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-4))
    count = bench.rows * bench.microbatches * placement.layout.dp
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, spec.vocab_size, (count, bench.length), generator=generator).tolist()
    batches = microbatches(runtime, texts, bench.rows)
    loss = mean_loss(runtime, batches, count * (bench.length - 1))

    def step() -> None:
        runtime.train(batches, loss)

    device.measure(world, step, 2)
    alone = device.measure(world, step, bench.repeats)
    checkpoints = Checkpoints(bench.folder, [runtime], keep=1)
    saves = [_saved(checkpoints, number, runtime, step) for number in range(1 + bench.saves)]
    first, later = saves[0], saves[1:]
    during = [seconds for save in later for seconds in save["steps_s"]]
    usual = statistics.median(alone)
    return {
        "alone_s": alone,
        "during_s": during,
        "alone_median_s": usual,
        "during_median_s": statistics.median(during),
        "ratio": statistics.median(during) / usual,
        "first_step_ratio": statistics.median(save["steps_s"][0] for save in later) / usual,
        "save_s": statistics.median(save["save_s"] for save in later),
        "call_s": statistics.median(save["call_s"] for save in later),
        "first_call_s": first["call_s"],
        "bytes": first["bytes"],
        "where": device.facts(world),
    }


def _saved(checkpoints: Checkpoints, number: int, runtime: ModelRuntime, step: Any) -> dict[str, Any]:
    """One save: seconds of the steps that began during it, the first with the call that began the save.

    What the files hold is compared with what was there before.
    """
    world = runtime.world
    before = fingerprints(runtime)
    call = 0.0

    def begin_and_step() -> None:
        nonlocal call
        start = time.perf_counter()
        checkpoints.save(number, {})
        call = time.perf_counter() - start
        step()

    steps = device.measure(world, begin_and_step, 1)
    while float(world.max(torch.tensor(float(checkpoints.under_way), device=world.device))):
        steps += device.measure(world, step, 1)
    checkpoints.wait()
    complete = world.share([(saved.seconds, saved.bytes) for saved in checkpoints.finished()])
    device.meet(world)  # rank 0 has renamed the folder
    found = {}
    file = bench_file(checkpoints.folder, number, world.rank)
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 - no mapping
            found[key] = crc(opened.get_slice(key)[:])  # get_tensor fails under torch 2.11
    if found != before:
        wrong = next(key for key in (*before, *found) if before.get(key) != found.get(key))
        raise RuntimeError(f"{file}: {wrong} is not what it was when the save began")
    return {"steps_s": steps, "call_s": call, "save_s": complete[0][0], "bytes": complete[0][1]}


def bench_file(folder: Path, number: int, rank: int) -> Path:
    """What a rank wrote."""
    return folder / f"state-{number}" / manifest.rank_file(rank)


def crc(values: Tensor) -> int:
    """Checksum of a tensor's values in the order of its dimensions."""
    return zlib.crc32(memoryview(values.contiguous().numpy()).cast("B"))


def fingerprints(runtime: ModelRuntime) -> dict[str, int]:
    """A checksum of every box that this rank will write, as it is now."""
    optimizer = runtime.optimizer
    assert optimizer is not None
    slots = {slot.local.name: i for i, slot in enumerate(optimizer.slots)}
    found = {}
    for own in manifest.owned(runtime.spec, runtime.placement.layout, runtime.coord):
        i = slots[runtime.stage.storages[own.index].name]
        low = optimizer.slots[i].low
        for kind, values in zip(manifest.KINDS, (optimizer.masters[i], *optimizer.moments(i)), strict=True):
            rows = values[own.piece.start - low : own.piece.stop - low].detach().cpu()
            key = manifest.box_key(runtime.name, own.piece.tensor, kind, own.piece.box)
            found[key] = crc(rows.t() if own.transposed else rows)
    return found


def _report(bench: CheckpointBench, row: dict[str, Any]) -> None:
    tp, pp, dp = bench.layout
    alone, during, size = row["alone_median_s"], row["during_median_s"], row["bytes"] / 1e9
    print(
        f"{bench.model} tp{tp} pp{pp} dp{dp} {bench.dtype}, {size:.2f} GB in {row['save_s']:.2f} s:"
        f" step {alone * 1e3:.1f} ms alone, {during * 1e3:.1f} ms during a save"
        f" ({row['ratio']:.3f}x; the step that begins one {row['first_step_ratio']:.3f}x, "
        f"{len(row['during_s'])} steps); the call {row['call_s'] * 1e3:.1f} ms, "
        f"the first one {row['first_call_s'] * 1e3:.1f} ms",
        flush=True,
    )
    if bench.out is not None:
        with bench.out.open("a") as file:
            settings = {**asdict(bench), "out": None, "folder": str(bench.folder)}
            file.write(json.dumps({"bench": "checkpoint", **settings, **row}) + "\n")
