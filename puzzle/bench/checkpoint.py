"""`puzzle bench checkpoint`: seconds of a training step alone and while a checkpoint is being written."""

from __future__ import annotations

import math
import shutil
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puzzle.bench import device
from puzzle.bench.arguments import LayoutBench, parser
from puzzle.bench.texts import mean_loss, random_batches
from puzzle.cli import named, whole
from puzzle.engine.checkpoint import manifest
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.launch import local


@dataclass(frozen=True, kw_only=True)
class CheckpointBench(LayoutBench):
    """What is measured; checkpoints are written to, and removed from, a new `folder`."""

    folder: Path
    rows: int
    length: int
    microbatches: int
    recompute: bool
    saves: int
    repeats: int


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    options = "model layers layout rows length microbatches recompute repeats"
    made = parser(
        "checkpoint", "Time training steps while a checkpoint is written.", options, model="350m", repeats=9
    )
    made.add_argument("--folder", type=named, required=True, help="a new folder on the disk to be measured")
    made.add_argument(
        "--saves", type=whole(1), default=3, metavar="K", help="checkpoints after the first one"
    )
    bench = CheckpointBench(**vars(made.parse_args(arguments)))
    if bench.folder.exists():
        raise UserError(f"--folder {bench.folder}: exists already; name a new one, it will be removed")
    if not bench.folder.absolute().parent.is_dir():
        raise UserError(f"--folder {bench.folder}: no folder {bench.folder.parent}")
    local.run("puzzle.bench.checkpoint:work", (bench,), math.prod(bench.layout))
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
    runtime = bench.runtime(world, bench.recompute)
    runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-4))
    count, batches = random_batches(runtime, bench.microbatches, bench.rows, bench.length)
    loss = PipelineInput(runtime, batches, mean_loss(runtime, batches, count * (bench.length - 1)))
    pipeline = Pipeline([runtime])

    def step() -> None:
        pipeline.train([loss])

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
    alone, during, size = row["alone_median_s"], row["during_median_s"], row["bytes"] / 1e9
    print(
        f"{bench.title} {bench.dtype}, {size:.2f} GB in {row['save_s']:.2f} s:"
        f" step {alone * 1e3:.1f} ms alone, {during * 1e3:.1f} ms during a save"
        f" ({row['ratio']:.3f}x; the step that begins one {row['first_step_ratio']:.3f}x, "
        f"{len(row['during_s'])} steps); the call {row['call_s'] * 1e3:.1f} ms, "
        f"the first one {row['first_call_s'] * 1e3:.1f} ms",
        flush=True,
    )
    bench.leave("checkpoint", row)
