"""What comes beside layers, measured: links, optimizer steps, the host's work per pass, mapping of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.bench import device, harness
from puzzle.bench.harness import Row
from puzzle.bench.pieces import LEAST, SHALLOW, Found, PiecesBench, as_row, fits, timed
from puzzle.bench.texts import mean_loss, ppo_loss, random_batches
from puzzle.bench.train import GradientSum
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.model.parallel import all_gather_flat, reduce_scatter_flat
from puzzle.plan.pipeline.actions import Channel, Payload
from puzzle.plan.predict.costs import Fixed
from puzzle.plan.predict.tables import (
    CollectiveRow,
    MessageRow,
    Shape,
    StepRow,
)
from puzzle.rlhf.algorithms.ppo import gae
from puzzle.spec.model import ModelSpec

PASSES = 4
"""Of a training step that is timed."""
POSITIONS = 64
"""Of advantages that are timed."""
MAPPED = 1 << 30
"""Bytes of device memory that are asked for anew."""


def links(bench: PiecesBench, world: World, found: Found) -> Iterator[Row]:
    """Collectives of 2, 4, ... ranks, and messages between neighbours."""
    for ranks in (n for n in (2, 4, 8, 16) if world.size % n == 0):
        starts = range(0, world.size, ranks)
        members = [tuple(range(start, start + ranks)) for start in starts]
        group = world.groups(members, "tp")
        for nbytes in sorted(bench.bytes):
            size = max(ranks, nbytes // 4 // ranks * ranks)
            whole_one = torch.ones(size, device=world.device)
            part = torch.ones(size // ranks, device=world.device)
            for op, work in (
                ("all_reduce", lambda w=whole_one, g=group: dist.all_reduce(w, group=g)),
                ("all_gather", lambda w=whole_one, p=part, g=group: all_gather_flat(w, p, group=g)),
                ("reduce_scatter", lambda w=whole_one, p=part, g=group: reduce_scatter_flat(p, w, group=g)),
            ):
                row = CollectiveRow(op, ranks, 1, size * 4, _repeated(world, work, bench.repeats))
                found.collectives.append(row)
                yield as_row("collective", row)
    ends = {(0, 1, Channel(0, 1, Payload.ACTIVATION))}
    channel = next(iter(world.connect(ends).values()), None)
    for nbytes in sorted(bench.bytes):
        words = torch.ones(max(1, nbytes // 4), device=world.device)

        def send(words: Tensor = words) -> None:
            if world.rank == 0:
                dist.send(words, 1, group=channel)
            elif world.rank == 1:
                dist.recv(words, 0, group=channel)

        row = MessageRow(words.nbytes, True, _repeated(world, send, bench.repeats))
        found.messages.append(row)
        yield as_row("message", row)


def _repeated(world: World, work: Callable[[], object], repeats: int) -> float:
    """Seconds of one of several in a row: to start and to wait for one takes as long as a small one."""
    times = 10 if world.device.type == "cuda" else 2
    return timed(world, lambda: [work() for _ in range(times)], repeats) / times


def beside(bench: PiecesBench, world: World, found: Found, specs: Sequence[ModelSpec]) -> Iterator[Row]:
    """Optimizer, the host's work per pass (of the first model), mapping of memory, the border of stages."""
    spec = specs[0]
    tp = world.size if fits(spec, world.size) else 1
    cut = replace(spec, num_layers=SHALLOW)
    sizes, length = (tp, 1, world.size // tp), min(bench.length, min(bench.tokens))
    prepare_s, found.pass_host = _pass_host(bench, world, found, cut, sizes, length)
    cuts = [replace(one, num_layers=SHALLOW) for one in specs]
    step_s = _steps(bench, world, found, cuts, sizes, length)
    yield {"step": "alone", "s/billion": found.step * 1e9, "beside_s": step_s}
    for dp in (n for n in (2, 4, 8, 16) if world.size % n == 0 and fits(spec, world.size // n)):
        seconds, own = _stepped(bench, world, cut, (world.size // dp, 1, dp), length)
        row = StepRow(dp, max(LEAST**2, (seconds - step_s) / (own * dp)))
        found.steps.append(row)
        yield {"step": f"dp {dp}", "s/billion": row.held_s * 1e9}
    clock = StageClock(world)
    stage_s = timed(world, lambda: clock.end("training"), bench.repeats)
    found.fixed = Fixed(
        map_s_per_byte=_mapping(world),
        stage_s=stage_s,
        host_s_per_byte=_to_host(world),
        step_s=step_s,
        prepare_s=prepare_s,
        position_s=_position(bench, world),
    )
    yield {
        "beside": f"{cut.hidden_size} x {cut.num_layers}",
        "pass_host_s": found.pass_host,
        "prepare_s": prepare_s,
        "position_s": found.fixed.position_s,
        "map s/GB": found.fixed.map_s_per_byte * 1e9,
        "host s/GB": found.fixed.host_s_per_byte * 1e9,
        "capture_s": found.capture,
        "stage_s": stage_s,
    }


def _pass_host(
    bench: PiecesBench, world: World, found: Found, spec: ModelSpec, sizes: harness.Sizes, length: int
) -> tuple[float, float]:
    """Seconds of the host to prepare a micro-batch: to pack it, to find the positions of its loss; and of a
    pass beside its layers and its head, to follow a schedule: forward and backward alike."""
    runtime = harness.random_model("model", spec, sizes, world, bench.dtype)
    pipeline, sums = Pipeline([runtime]), [GradientSum(runtime.decoder)]
    prepared, passed = [], []
    for _ in range(1 + bench.repeats):
        device.meet(world)
        start = time.perf_counter()
        _, batches = random_batches(runtime, PASSES, 1, length)
        given = PipelineInput(runtime, batches, ppo_loss(runtime, batches))
        ready = time.perf_counter()
        pipeline.train([given], gradients=sums)
        passed.append(time.perf_counter() - ready)
        prepared.append(ready - start)
        world.synchronize()
    prepare_s, whole = (device.most(world, median(one[1:])) / PASSES for one in (prepared, passed))
    alone = 0.0
    for row in found.layers:
        if (row.shape, row.tp, row.tokens) == (Shape.of(spec), sizes[0], length):
            alone += SHALLOW * (row.issue_forward_s + row.issue_backward_s)
    widths = (spec.hidden_size, spec.vocab_size, sizes[0], length)
    for head in found.heads:
        if (head.hidden, head.vocab, head.tp, head.tokens) == widths:
            alone += head.issue_forward_s + head.issue_backward_s
    return prepare_s, max(LEAST, (whole - alone) / 2)


def _position(bench: PiecesBench, world: World) -> float:
    """Seconds of a position of advantages, which the host computes one after another."""
    shape = (max(1, min(bench.rows)), POSITIONS)
    values = torch.zeros(shape, device=world.device)
    mask = torch.ones(shape, dtype=torch.bool, device=world.device)
    return timed(world, lambda: gae(values, values, mask, 1.0, 0.95), bench.repeats) / POSITIONS


def _steps(
    bench: PiecesBench,
    world: World,
    found: Found,
    cuts: Sequence[ModelSpec],
    sizes: harness.Sizes,
    length: int,
) -> float:
    """Optimizer steps of two sizes: what a parameter more takes, and the seconds that are left (returned).

    The smallest of `cuts` is beside the first, or that with one layer: no more memory, and as many tensors.
    """
    small = min((one for one in cuts if fits(one, sizes[0])), key=lambda one: one.parameters)
    if small.parameters == cuts[0].parameters:
        small = replace(cuts[0], num_layers=1)
    (less, few), (more, many) = (_stepped(bench, world, spec, sizes, length) for spec in (small, cuts[0]))
    found.step = max(LEAST**2, (more - less) / (many - few))
    return max(0.0, less - found.step * few)


def _stepped(
    bench: PiecesBench, world: World, spec: ModelSpec, sizes: harness.Sizes, length: int
) -> tuple[float, float]:
    """Seconds of an optimizer step, and the parameters that a rank steps."""
    (without, _, held), (stepped, _, _) = (
        _trained(bench, world, spec, sizes, length, optimizer) for optimizer in (False, True)
    )
    return max(0.0, stepped - without), held


def _trained(
    bench: PiecesBench, world: World, spec: ModelSpec, sizes: harness.Sizes, length: int, optimizer: bool
) -> tuple[float, int, float]:
    """Seconds of a training step of short passes, how many passes, and the parameters a rank would step."""
    runtime = harness.random_model("model", spec, sizes, world, bench.dtype)
    count, batches = random_batches(runtime, PASSES, 1, length)
    given = PipelineInput(runtime, batches, mean_loss(runtime, batches, count * (length - 1)))
    pipeline = Pipeline([runtime])
    if optimizer:
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
    sums = None if optimizer else [GradientSum(runtime.decoder)]
    seconds = timed(world, lambda: pipeline.train([given], gradients=sums), bench.repeats)
    held = sum(parameter.numel() for parameter in runtime.decoder.parameters()) / sizes[2]
    return seconds, len(batches), held


def _to_host(world: World) -> float:
    """Seconds to bring a byte to pinned memory of the host, all devices at once; 0 on a CPU."""
    if world.device.type != "cuda":
        return 0.0
    there = torch.empty(MAPPED // 4, dtype=torch.uint8, device=world.device)
    here = torch.empty(MAPPED // 4, dtype=torch.uint8, pin_memory=True)
    return timed(world, lambda: here.copy_(there, non_blocking=True), 3) / there.nbytes


def _mapping(world: World) -> float:
    """Seconds to get a byte of memory that this process did not hold."""
    if world.device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    found = []
    for _ in range(3):
        device.meet(world)
        start = time.perf_counter()
        kept = torch.empty(MAPPED, dtype=torch.uint8, device=world.device)
        found.append(time.perf_counter() - start)
        del kept
        torch.cuda.empty_cache()
    return device.most(world, median(found)) / MAPPED
