"""`puzzle bench train` and `checkpoint`: steps of one model in one layout, alone and during a save."""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from puzzle.bench import device, fit, harness
from puzzle.bench.harness import Row, option
from puzzle.bench.texts import mean_loss, random_batches, token_logprobs
from puzzle.cli import named, whole
from puzzle.engine.checkpoint import manifest
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.linear import accumulate, send_gradients
from puzzle.model.packing import PackedBatch
from puzzle.plan.memory import RankMemory
from puzzle.plan.pipeline.actions import Op
from puzzle.spec.flops import forward_flops, train_flops


@dataclass(frozen=True, kw_only=True)
class StepBench(harness.LayoutBench):
    """A measurement of training steps on random texts."""

    rows: harness.Rows = 4
    length: harness.Length = 512
    microbatches: Annotated[int, harness.microbatches(help="per replica and step")] = 4
    smaller: ClassVar[Mapping[str, str]] = {
        "activations": "lower --rows or --length",
        "logits": "lower --rows or --length",
        "one layer": "lower --rows or --length",
        **harness.Bench.smaller,
    }

    def memory(self, world: World) -> RankMemory:
        one = replace(self.use("model", self.layout, world), trained=True)
        sequences = self.rows * self.microbatches * self.layout[2]
        return fit.steps(world.rank, [one], sequences, self.length, self.rows, ["training"])

    def made(self, world: World) -> tuple[ModelRuntime, list[PackedBatch], PipelineInput]:
        """The model, this replica's micro-batches, and what training takes of them."""
        runtime = harness.random_model("model", self.spec, self.layout, world, self.dtype)
        count, batches = random_batches(runtime, self.microbatches, self.rows, self.length)
        loss = mean_loss(runtime, batches, count * (self.length - 1))
        return runtime, batches, PipelineInput(runtime, batches, loss)


@dataclass(frozen=True, kw_only=True)
class TrainBench(StepBench):
    """Time training and forward passes."""

    optimizer: Annotated[bool, option(help="end every step with AdamW")] = False
    modes: Annotated[Sequence[str], harness.several("eager", "compile")] = ("eager", "compile")
    repeats: harness.Repeats = 5

    def memory(self, world: World) -> RankMemory:
        found = super().memory(world)
        return found if self.optimizer else fit.without_states(found, self.use("model", self.layout, world))

    def measure(self, world: World) -> Iterator[Row]:
        device.reset_peak(world.device)
        runtime, batches, loss = self.made(world)
        if self.optimizer:
            runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
        gradients = None if self.optimizer else [GradientSum(runtime.decoder)]
        logprobs = PipelineInput(runtime, batches, token_logprobs(runtime, batches))
        pipeline = Pipeline([runtime])
        losses: list[Tensor] = []

        def train() -> None:
            losses[:] = pipeline.train([loss], gradients=gradients)[0].results

        passes = {"train": train, "forward": lambda: pipeline.infer([logprobs])}
        found = []
        for mode in self.modes:
            if mode == "compile":
                runtime.decoder.compile_layers()
            for name, step in passes.items():
                warm_up = sum(device.measure(world, step, 2))
                device.reset_peak(world.device)
                seconds = device.measure(world, step, self.repeats)
                row = {"pass": name, "mode": mode, "warm_up_s": warm_up, "seconds": seconds}
                found.append(row | self._rates(world, name, median(seconds)))
        own = torch.stack(losses).sum() if runtime.owns_results else torch.zeros((), device=world.device)
        value = float(world.sum(own.clone()))
        yield from (row | {"loss": value} for row in found)

    def _rates(self, world: World, name: str, seconds: float) -> Row:
        sequences = self.rows * self.microbatches * self.layout[2]
        flops = (train_flops if name == "train" else forward_flops)(self.spec, [self.length] * sequences)
        return {
            "median_s": seconds,
            "tokens_per_s": sequences * self.length / seconds,
            "flops_per_s_and_device": flops / seconds / world.size,
            "mfu": device.mfu(world, flops, seconds),
            "peak_bytes": device.peak_bytes(world),
        }

    def line(self, row: Row) -> str:
        mfu = "  no peak known" if row["mfu"] is None else f"  MFU {row['mfu']:.3f}"
        step = row["pass"] + ("+adamw" if self.optimizer and row["pass"] == "train" else "")
        return (
            f"{self.title}  {self.microbatches} x {self.rows} x {self.length} {self.dtype}"
            f"  {step:<13}{row['mode']:<8}{row['median_s'] * 1e3:9.1f} ms"
            f"  {row['tokens_per_s']:9.0f} tokens/s{mfu}{device.gib(row['peak_bytes'])}"
        )


class GradientSum:
    """Adds gradients up in float32 as training does, without optimizer states: 6 bytes per bf16 parameter."""

    def __init__(self, decoder: Decoder) -> None:
        self.sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in decoder.parameters()}
        self.fresh: set[nn.Parameter] = set()
        for parameter in self.sums:
            send_gradients(parameter, self._take, self._take_product)

    def begin(self, passes: int) -> None:
        """Forget the sums of the step before."""
        self.fresh = set(self.sums)

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return  # its sink has taken it
        total = self.sums[parameter]
        (total.copy_ if parameter in self.fresh else total.add_)(parameter.grad)
        self.fresh.discard(parameter)
        parameter.grad = None

    def _take_product(self, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        accumulate(self.sums[parameter], left, right, parameter in self.fresh)
        self.fresh.discard(parameter)

    def do(self, op: Op) -> None:
        """There is no optimizer step here."""
        raise ValueError(f"{op} without an optimizer")


@dataclass(frozen=True, kw_only=True)
class CheckpointBench(StepBench):
    """Time training steps while a checkpoint is written."""

    model: harness.Model = "350m"
    folder: Annotated[Path, option(type=named, help="a new folder on the disk to be measured")]
    saves: Annotated[int, option(type=whole(1), metavar="K", help="checkpoints after the first one")] = 3
    repeats: harness.Repeats = 9

    def check(self) -> None:
        super().check()
        if self.folder.exists():
            raise UserError(f"--folder {self.folder}: exists already; name a new one, it will be removed")
        if not self.folder.absolute().parent.is_dir():
            raise UserError(f"--folder {self.folder}: no folder {self.folder.parent}")

    def measure(self, world: World) -> Iterator[Row]:
        """RuntimeError if a file differs from what was there when its save began."""
        runtime, _, loss = self.made(world)
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-4))
        pipeline = Pipeline([runtime])

        def step() -> None:
            pipeline.train([loss])

        device.measure(world, step, 2)
        alone = device.measure(world, step, self.repeats)
        checkpoints = Checkpoints(self.folder, [runtime], keep=1)
        first, *later = (_saved(checkpoints, number, runtime, step) for number in range(1 + self.saves))
        during = [seconds for save in later for seconds in save["steps_s"]]
        usual = median(alone)
        device.meet(world)  # all have compared their files
        if world.rank == 0:
            shutil.rmtree(self.folder)
        yield {
            "alone_s": alone,
            "during_s": during,
            "alone_median_s": usual,
            "during_median_s": median(during),
            "ratio": median(during) / usual,
            "first_step_ratio": median(save["steps_s"][0] for save in later) / usual,
            "save_s": median(save["save_s"] for save in later),
            "call_s": median(save["call_s"] for save in later),
            "first_call_s": first["call_s"],
            "bytes": first["bytes"],
        }

    def line(self, row: Row) -> str:
        alone, during, size = row["alone_median_s"], row["during_median_s"], row["bytes"] / 1e9
        return (
            f"{self.title} {self.dtype}, {size:.2f} GB in {row['save_s']:.2f} s:"
            f" step {alone * 1e3:.1f} ms alone, {during * 1e3:.1f} ms during a save"
            f" ({row['ratio']:.3f}x; the step that begins one {row['first_step_ratio']:.3f}x, "
            f"{len(row['during_s'])} steps); the call {row['call_s'] * 1e3:.1f} ms, "
            f"the first one {row['first_call_s'] * 1e3:.1f} ms"
        )


def _saved(checkpoints: Checkpoints, number: int, runtime: ModelRuntime, step: Callable[[], None]) -> Row:
    """One save: seconds of the steps that began during it, the first with the call that began the save.

    What the files hold is compared with what was there before.
    """
    world, before, calls = runtime.world, _fingerprints(runtime), []

    def begin_and_step() -> None:
        start = time.perf_counter()
        checkpoints.save(number, {})
        calls.append(time.perf_counter() - start)
        step()

    steps = device.measure(world, begin_and_step, 1)
    while device.most(world, checkpoints.under_way):
        steps += device.measure(world, step, 1)
    checkpoints.wait()
    seconds, size = world.share([(saved.seconds, saved.bytes) for saved in checkpoints.finished()])[0]
    device.meet(world)  # rank 0 has renamed the folder
    file = checkpoints.folder / f"state-{number}" / manifest.rank_file(world.rank)
    with safe_open(file, framework="pt") as opened:  # get_tensor fails under torch 2.11
        found = {key: _crc(opened.get_slice(key)[:]) for key in opened.keys()}  # noqa: SIM118 - no mapping
    if found != before:
        wrong = next(key for key in (*before, *found) if before.get(key) != found.get(key))
        raise RuntimeError(f"{file}: {wrong} is not what it was when the save began")
    return {"steps_s": steps, "call_s": calls[0], "save_s": seconds, "bytes": size}


def _crc(values: Tensor) -> int:
    """Checksum of a tensor's values in the order of its dimensions."""
    return zlib.crc32(memoryview(values.contiguous().numpy()).cast("B"))


def _fingerprints(runtime: ModelRuntime) -> dict[str, int]:
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
            found[key] = _crc(rows.t() if own.transposed else rows)
    return found
