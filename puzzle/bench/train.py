"""`puzzle bench train`: training and forward passes of one model in one layout, timed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.bench import device
from puzzle.bench.texts import mean_loss, microbatches, token_logprobs
from puzzle.cli import Parser
from puzzle.engine.optimizer import AdamWSettings
from puzzle.engine.runtime import ModelRuntime
from puzzle.engine.stage import StageRun
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.model.decoder import Decoder
from puzzle.model.products import Weight, accumulate
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipelines import forward_only, one_f_one_b
from puzzle.plan.schedule import Op
from puzzle.spec.flops import forward_flops, train_flops
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import PUBLISHED, published

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TrainBench:
    """What is measured; `layers` 0 keeps the model's own number."""

    model: str
    layers: int
    layout: tuple[int, int, int]
    rows: int
    length: int
    microbatches: int
    optimizer: bool
    recompute: bool
    modes: tuple[str, ...]
    repeats: int
    dtype: str
    device: str
    out: Path | None

    @property
    def spec(self) -> ModelSpec:
        """The model, cut to `layers` layers if that is asked for."""
        spec = published(self.model)
        return replace(spec, num_layers=self.layers) if self.layers else spec


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    parser = Parser("puzzle bench train", description="Time training and forward passes.")
    parser.add_argument("--model", default="7b", choices=sorted(PUBLISHED), help="published size")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep N decoder layers only")
    parser.add_argument("--layout", default="1,1,1", metavar="TP,PP,DP")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=4, metavar="M", help="per replica and step")
    parser.add_argument("--optimizer", action="store_true", help="end every step with AdamW")
    parser.add_argument("--recompute", action="store_true", help="keep only layer inputs for the backward")
    parser.add_argument("--modes", default="eager,compile", help="eager, compile or both")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="the median of K is reported")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the results to FILE, one JSON per line")
    given = vars(parser.parse_args(arguments))
    given["layout"] = read_layout(given["layout"])
    given["modes"] = tuple(given["modes"].split(","))
    unknown = set(given["modes"]) - {"eager", "compile"}
    if unknown:
        raise UserError(f"--modes {unknown.pop()}: there are eager and compile")
    bench = TrainBench(**given)
    world = bench.layout[0] * bench.layout[1] * bench.layout[2]
    local.run("puzzle.bench.train:work", (bench,), world)
    return 0


def read_layout(text: str) -> tuple[int, int, int]:
    """(tp, pp, dp) of `TP,PP,DP`."""
    try:
        tp, pp, dp = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layout {text}: give three numbers as TP,PP,DP") from None
    return tp, pp, dp


def work(bench: TrainBench) -> None:
    """What every process does; rank 0 reports."""
    with World.start(bench.device) as world:
        for row in rows(bench, world):
            if world.rank == 0:
                _report(bench, row)


def rows(bench: TrainBench, world: World) -> list[dict[str, Any]]:
    """One measurement per mode and pass."""
    spec = bench.spec
    placement = Placement.default(Layout.even(*bench.layout, spec.num_layers))
    device.reset_peak(world.device)
    runtime = ModelRuntime("model", spec, placement, world, DTYPES[bench.dtype], bench.recompute)
    initialise(runtime.decoder, 0)
    if bench.optimizer:
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
        gradients = runtime.optimizer
    else:
        gradients = GradientSum(runtime.decoder)
    count = bench.rows * bench.microbatches * placement.layout.dp
    texts = torch.randint(
        0, spec.vocab_size, (count, bench.length), generator=torch.Generator().manual_seed(1)
    ).tolist()
    batches = microbatches(runtime, texts, bench.rows)
    loss = mean_loss(runtime, batches, count * (bench.length - 1))
    logprobs = token_logprobs(runtime, batches)
    pp = placement.layout.pp
    training = one_f_one_b(pp, len(batches), "model", optimizer=bench.optimizer)
    scoring = forward_only(pp, len(batches), "model")
    losses: list[Tensor] = []

    def train() -> None:
        stage = StageRun(runtime.stage, batches, loss, gradients)
        runtime.runner.run(training, {"model": stage})
        losses[:] = [r for r in stage.results if r is not None]

    def score() -> None:
        stage = StageRun(runtime.stage, batches, logprobs)
        runtime.runner.run(scoring, {"model": stage})

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
    tp, pp, dp = bench.layout
    mfu = "  no peak known" if row["mfu"] is None else f"  MFU {row['mfu']:.3f}"
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.1f} GiB"
    step = "+adamw" if bench.optimizer and row["pass"] == "train" else ""
    print(
        f"{bench.model} {bench.spec.num_layers} layers  tp{tp} pp{pp} dp{dp}  "
        f"{bench.microbatches} x {bench.rows} x {bench.length} {bench.dtype}  {row['pass'] + step:<13}"
        f"{row['mode']:<8}{row['median_s'] * 1e3:9.1f} ms  {row['tokens_per_s']:9.0f} tokens/s{mfu}{memory}",
        flush=True,
    )
    if bench.out is not None:
        with bench.out.open("a") as file:
            settings = {**asdict(bench), "out": None, "layers": bench.spec.num_layers}
            file.write(json.dumps({"bench": "train", **settings, **row}) + "\n")


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
