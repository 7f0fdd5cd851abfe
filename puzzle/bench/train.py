"""`puzzle bench train`: training and forward passes of one model in one layout, timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.bench import device
from puzzle.bench.arguments import LayoutBench, parser
from puzzle.bench.texts import mean_loss, random_batches, token_logprobs
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.launch import local
from puzzle.model.decoder import Decoder
from puzzle.model.linear import Weight, accumulate
from puzzle.plan.pipeline.actions import Op
from puzzle.spec.flops import forward_flops, train_flops


@dataclass(frozen=True, kw_only=True)
class TrainBench(LayoutBench):
    """What is measured."""

    rows: int
    length: int
    microbatches: int
    optimizer: bool
    recompute: bool
    modes: Sequence[str]
    repeats: int


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    options = "model layers layout rows length microbatches recompute repeats"
    made = parser("train", "Time training and forward passes.", options)
    made.add_argument("--optimizer", action="store_true", help="end every step with AdamW")
    modes = ("eager", "compile")
    made.add_argument("--modes", nargs="+", choices=modes, default=modes)
    bench = TrainBench(**vars(made.parse_args(arguments)))
    local.run("puzzle.bench.train:work", (bench,), math.prod(bench.layout))
    return 0


def work(bench: TrainBench) -> None:
    """What every process does; rank 0 reports."""
    with World.start(bench.device) as world:
        for row in rows(bench, world):
            if world.rank == 0:
                _report(bench, row)


def rows(bench: TrainBench, world: World) -> list[dict[str, Any]]:
    """One measurement per mode and pass."""
    device.reset_peak(world.device)
    runtime = bench.runtime(world, bench.recompute)
    if bench.optimizer:
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
    gradients = None if bench.optimizer else [GradientSum(runtime.decoder)]
    count, batches = random_batches(runtime, bench.microbatches, bench.rows, bench.length)
    loss = PipelineInput(runtime, batches, mean_loss(runtime, batches, count * (bench.length - 1)))
    logprobs = PipelineInput(runtime, batches, token_logprobs(runtime, batches))
    pipeline = Pipeline([runtime])
    losses: list[Tensor] = []

    def train() -> None:
        losses[:] = pipeline.train([loss], gradients=gradients)[0].results

    def score() -> None:
        pipeline.infer([logprobs])

    found = []
    for mode in bench.modes:
        if mode == "compile":
            runtime.decoder.compile_layers()
        for name, step in (("train", train), ("forward", score)):
            warm_up = sum(device.measure(world, step, 2))
            device.reset_peak(world.device)
            seconds = device.measure(world, step, bench.repeats)
            found.append(
                {"pass": name, "mode": mode, "warm_up_s": warm_up, "seconds": seconds}
                | _rates(bench, world, name, seconds)
            )
    value = torch.stack(losses).sum() if runtime.owns_results else torch.zeros((), device=world.device)
    value = float(world.sum(value.clone()))
    return [row | {"loss": value} for row in found]


def _rates(bench: TrainBench, world: World, name: str, seconds: list[float]) -> dict[str, Any]:
    sequences = bench.rows * bench.microbatches * bench.layout[2]
    count = train_flops if name == "train" else forward_flops
    flops = count(bench.spec, [bench.length] * sequences)
    median = statistics.median(seconds)
    peak = device.peak_flops(world.device)
    return {
        "median_s": median,
        "tokens_per_s": sequences * bench.length / median,
        "flops_per_s_and_device": flops / median / world.size,
        "mfu": None if peak is None else flops / median / world.size / peak,
        "peak_bytes": device.peak_bytes(world),
        "where": device.facts(world),
    }


def _report(bench: TrainBench, row: dict[str, Any]) -> None:
    mfu = "  no peak known" if row["mfu"] is None else f"  MFU {row['mfu']:.3f}"
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.1f} GiB"
    step = "+adamw" if bench.optimizer and row["pass"] == "train" else ""
    print(
        f"{bench.title}  {bench.microbatches} x {bench.rows} x {bench.length} {bench.dtype}"
        f"  {row['pass'] + step:<13}{row['mode']:<8}{row['median_s'] * 1e3:9.1f} ms"
        f"  {row['tokens_per_s']:9.0f} tokens/s{mfu}{memory}",
        flush=True,
    )
    bench.leave("train", row)


class GradientSum:
    """Adds gradients up in float32 as training does, without optimizer states: 6 bytes per bf16 parameter."""

    def __init__(self, decoder: Decoder) -> None:
        self._sums: dict[int, Tensor] = {}
        self._fresh: set[int] = set()
        for parameter in decoder.parameters():
            self._sums[id(parameter)] = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(self._take)
            if isinstance(parameter, Weight):
                parameter.sink = partial(self._take_product, id(parameter))

    def begin(self, passes: int) -> None:
        """Forget the sums of the step before."""
        self._fresh = set(self._sums)

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return  # its sink has taken it
        total = self._sums[id(parameter)]
        if id(parameter) in self._fresh:
            self._fresh.remove(id(parameter))
            total.copy_(parameter.grad)
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def _take_product(self, key: int, left: Tensor, right: Tensor) -> None:
        accumulate(self._sums[key], left, right, key in self._fresh)
        self._fresh.discard(key)

    def do(self, op: Op) -> None:
        """There is no optimizer step here."""
        raise ValueError(f"{op} without an optimizer")
