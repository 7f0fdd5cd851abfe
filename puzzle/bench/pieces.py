"""What passes are made of, measured piece by piece: layers, heads, decode passes.

Layers are those of a middle stage, so that nothing else is timed with them; decode passes go through the
engine's generation, with two numbers of layers, whose difference is a layer.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from puzzle.bench import device, fit, harness
from puzzle.bench.harness import Row, option
from puzzle.bench.train import GradientSum
from puzzle.cli import new_file, real, whole
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.model.decoder import Decoder
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import initialise
from puzzle.plan.activations import FP32, Activations, Use
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.memory import RankMemory, weight_bytes
from puzzle.plan.pages import kv_bytes
from puzzle.plan.predict.costs import Fixed
from puzzle.plan.predict.tables import (
    CollectiveRow,
    DecodeRow,
    HeadRow,
    LayerRow,
    MessageRow,
    Shape,
    StepRow,
)
from puzzle.spec.model import ModelSpec

LAYERS = 4
"""Of a stage that is timed: one's time is a small part of what starting and waiting take."""
SHALLOW, DEEP = 2, 6
"""Layers of the models whose decode passes are compared."""
STEPS = 32
"""Decode passes that are timed."""
MANY = 32
"""Rows of a decode pass up to which launching may take longest."""
FEW = (16, 128)
"""Positions of a head, beside those of training: prompts have logits at their ends alone."""
LEAST = 1e-9
"""Seconds; differences of measurements may be less."""


def _sizes(text: str) -> dict[str, Any]:
    return option(nargs="+", type=whole(1), help=text)


@dataclass
class Found:
    """What was measured so far."""

    layers: list[LayerRow] = field(default_factory=list)
    heads: list[HeadRow] = field(default_factory=list)
    decodes: list[DecodeRow] = field(default_factory=list)
    collectives: list[CollectiveRow] = field(default_factory=list)
    messages: list[MessageRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    step: float = LEAST
    pass_host: float = LEAST
    fixed: Fixed = field(default_factory=Fixed)
    capture: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PiecesBench(harness.Bench):
    """A measurement of what passes are made of."""

    out: Annotated[Path, option(type=new_file, metavar="FILE", help="the calibration")]
    world: Annotated[int, option(type=whole(1, MOST_PROCESSES), metavar="N", help="devices of this host")] = 1
    models: Annotated[Sequence[str], option(nargs="+", help="whose layers and decode passes")] = (
        "7b",
        "350m",
    )
    dtype: harness.Dtype = "bf16"
    tokens: Annotated[Sequence[int], _sizes("of a micro-batch of training")] = (
        512,
        1024,
        2048,
        4096,
        8192,
        16384,
    )
    length: harness.Length = 512
    rows: Annotated[Sequence[int], _sizes("of a decode pass")] = (1, 8, 16, 32, 64, 128, 256)
    prompts: Annotated[Sequence[int], _sizes("cached tokens of decode passes, before theirs")] = (64, 512)
    bytes: Annotated[Sequence[int], _sizes("of a collective or message")] = (
        1 << 14,
        1 << 18,
        1 << 22,
        1 << 26,
        1 << 28,
    )
    compile: Annotated[bool, option(help="time layers through torch.compile")] = False
    engine: Annotated[str, option(help="commit or name of the engine; default: this checkout's")] = ""
    seconds: Annotated[float, option(type=real(0), metavar="S", help="begin nothing after so long")] = 150.0
    repeats: harness.Repeats = 7
    smaller: ClassVar[Mapping[str, str]] = {
        "cache": "lower --rows or --prompts",
        "activations": "lower --tokens",
        "": "give smaller --models",
    }
    timeout: ClassVar[float] = 120.0

    def memory(self, world: World) -> RankMemory:
        """With one tensor rank, the widest part that is measured."""
        itemsize, fused = harness.DTYPES[self.dtype].itemsize, world.device.type == "cuda"
        specs = [harness.cut(name, 0) for name in self.models]
        stages = {}
        for name, spec in zip(self.models, specs, strict=True):
            cut, layout = replace(spec, num_layers=LAYERS + 2), Layout(1, 3, 1, (1, LAYERS, 1))
            one = Use(name, cut, Placement.default(layout), itemsize, fused=fused, compiled=self.compile)
            weights = weight_bytes(cut, layout, Coord(0, 1, 0), itemsize)
            stages[f"layers of {name}"] = {
                f"{name} weights": weights,
                f"{name} gradients": weights // itemsize * FP32,
                f"{name} activations": Activations(one, 1, max(self.tokens), 0).saved(),
            }
        alone = {n: Layout.even(1, 1, 1, n) for n in (SHALLOW, DEEP)}
        cached = max(self.rows) * (max(self.prompts) + STEPS + 2)
        for name, spec in zip(self.models, specs, strict=True):
            cuts = {n: replace(spec, num_layers=n) for n in alone}
            stages[f"decode passes of {name}"] = {
                f"{name} weights": sum(
                    weight_bytes(cuts[n], alone[n], Coord(0, 0, 0), itemsize) for n in alone
                ),
                "kv cache": kv_bytes(cuts[DEEP], alone[DEEP], 0, cached, itemsize),
            }
        sizes = (world.size, 1, 1) if fits(specs[0], world.size) else (1, 1, world.size)
        stepped = replace(
            fit.use(self.models[0], replace(specs[0], num_layers=SHALLOW), sizes, itemsize, fused),
            trained=True,
        )
        length = min(self.length, *self.tokens)
        steps = fit.steps(world.rank, [stepped], 4 * sizes[2], length, 1, ["training"])
        stages["optimizer steps"] = {**steps.resident, **steps.stages["training"]}
        return RankMemory(world.rank, {}, stages)


def fits(spec: ModelSpec, tp: int) -> bool:
    """Whether a model can be cut into `tp` parts."""
    try:
        Layout.even(tp, 1, 1, spec.num_layers).check(spec)
    except UserError:
        return False
    return True


def as_row(kind: str, row: Any) -> Row:
    """A row for people, its shape as the hidden size."""
    values = asdict(row)
    shape = values.pop("shape", None)
    return {kind: "" if shape is None else shape["hidden"], **values}


def timed(world: World, work: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one run that warms up."""
    device.measure(world, work, 1)
    return max(LEAST, median(device.measure(world, work, repeats)))


def _issued(world: World, work: Callable[[], object], repeats: int) -> float:
    """Median seconds until `work` has been issued to an idle device."""
    found = []
    for _ in range(repeats):
        device.meet(world)
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
        world.synchronize()
    return max(LEAST, device.most(world, median(found)))


def tensor_group(world: World, tp: int) -> TensorGroup:
    """This rank's group of `tp` neighbours."""
    starts = range(0, world.size, tp)
    members = [tuple(range(start, start + tp)) for start in starts]
    mine = members[world.rank // tp]
    return TensorGroup(world.groups(members, "tp"), mine) if tp > 1 else TensorGroup()


def _stage(bench: PiecesBench, world: World, spec: ModelSpec, tp: int, p: int) -> Decoder:
    """Stage p of three; the middle one has `LAYERS` layers and nothing else."""
    layout = Layout(tp, 3, 1, (1, LAYERS, 1))
    cut = replace(spec, num_layers=LAYERS + 2)
    dtype = harness.DTYPES[bench.dtype]
    made = Decoder(cut, layout, Coord(world.rank % tp, p, 0), tensor_group(world, tp), dtype, world.device)
    initialise(made, 0)
    if bench.compile:
        made.compile_layers()
    return made


def layers(bench: PiecesBench, world: World, found: Found, spec: ModelSpec, tp: int) -> Iterator[Row]:
    """Layers and heads, by tokens."""
    middle = _stage(bench, world, spec, tp, 1)
    sums = GradientSum(middle)
    for tokens in sorted(bench.tokens):
        row = _layer_row(bench, world, middle, sums, spec, tokens)
        found.layers.append(row)
        yield as_row("layer", row)
    del middle, sums
    gc.collect()
    if spec.head == "lm":
        last = _stage(bench, world, spec, tp, 2)
        last.requires_grad_(True)
        for tokens in sorted({*FEW, *bench.tokens}):
            head = _head_row(bench, world, last, spec, tokens)
            found.heads.append(head)
            yield as_row("head", head)


def _layer_row(
    bench: PiecesBench, world: World, stage: Decoder, sums: GradientSum, spec: ModelSpec, tokens: int
) -> LayerRow:
    tp, length = stage.layout.tp, min(bench.length, tokens)
    texts = [[1] * length] * max(1, tokens // length)
    batch = pack(texts, tp, world.device)
    wide = (batch.total // tp, spec.hidden_size)
    x = torch.randn(wide, device=world.device).to(stage.dtype).requires_grad_()
    gradient = torch.randn(wide, device=world.device).to(stage.dtype)
    kept: list[Tensor] = []

    def infer() -> None:
        with torch.no_grad():
            stage(x.detach(), batch)

    def forward() -> None:
        kept[:] = [stage(x, batch)]

    def backward() -> None:
        sums.begin(1)
        x.grad = None
        torch.autograd.backward(kept.pop(), gradient)

    def apart() -> float:
        """Seconds of what a split backward leaves for later."""
        sums.begin(1)
        forward()
        with stage.later.deferring() as products:
            torch.autograd.backward(kept.pop(), gradient)
        with torch.no_grad():
            return device.measure(world, lambda: [add() for add in products], 1)[0]

    def backwards() -> tuple[float, float]:
        forward()
        device.meet(world)
        start = time.perf_counter()
        backward()
        issued = time.perf_counter() - start
        world.synchronize()
        return device.most(world, time.perf_counter() - start), device.most(world, issued)

    infer_s = timed(world, infer, bench.repeats)
    forward_s = timed(world, forward, bench.repeats)
    issue = _issued(world, infer, bench.repeats), _issued(world, forward, bench.repeats)
    kept.clear()
    backwards()
    both = [backwards() for _ in range(bench.repeats)]
    weights_s = median(apart() for _ in range(bench.repeats))
    seconds = (infer_s, forward_s, median(b for b, _ in both), weights_s, *issue, median(i for _, i in both))
    each = [max(LEAST, value / LAYERS) for value in seconds]
    return LayerRow(Shape.of(spec), tp, len(texts) * length, length, *each)


def _head_row(bench: PiecesBench, world: World, stage: Decoder, spec: ModelSpec, tokens: int) -> HeadRow:
    tp = stage.layout.tp
    tokens = -(-tokens // tp) * tp
    hidden = torch.randn((tokens // tp, spec.hidden_size), device=world.device).to(stage.dtype)
    hidden.requires_grad_()
    rows = torch.arange(tokens, device=world.device)
    targets = rows % spec.vocab_size

    def forward() -> Tensor:
        return stage.token_stats(hidden, rows, targets).logprobs

    def infer() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        forward().sum().backward()
        stage.head_weight.grad = None

    infer_s, forward_s = timed(world, infer, bench.repeats), timed(world, forward, bench.repeats)
    backward_s = max(LEAST, timed(world, both, bench.repeats) - forward_s)
    return HeadRow(spec.hidden_size, spec.vocab_size, tp, tokens, infer_s, forward_s, backward_s)


def decodes(bench: PiecesBench, world: World, found: Found, spec: ModelSpec, tp: int) -> Iterator[Row]:
    """Decode passes by rows and cached tokens: a layer is what a deeper model takes more.

    Only few rows wait for the host to launch: what others take launched follows.
    """
    deep, shallow = (Answers(bench, world, replace(spec, num_layers=n), tp) for n in (DEEP, SHALLOW))
    short, *longer = sorted(bench.prompts)

    def measured(rows: int, prompt: int, graphs: bool) -> tuple[float, float]:
        slow, fast = (one.step(rows, prompt, graphs) for one in (deep, shallow))
        layer = max(LEAST, (slow - fast) / (DEEP - SHALLOW))
        return layer, max(LEAST, fast - SHALLOW * layer)

    launched = (LEAST, LEAST)
    cuda = world.device.type == "cuda"
    for prompt, rows in [(p, r) for p in (short, *longer) for r in sorted(bench.rows)]:
        passes = measured(rows, prompt, cuda)
        if cuda and prompt == short and rows <= MANY:
            launched = measured(rows, prompt, False)
        eager = [max(pair) for pair in zip(launched, passes, strict=True)] if cuda else passes
        row = DecodeRow(Shape.of(spec), spec.vocab_size, tp, rows, prompt + 1 + STEPS / 2, *passes, *eager)
        found.decodes.append(row)
        yield as_row("decode", row)
    if deep.captures:  # the first ones compile kernels, too, which a host does once
        found.capture = max(found.capture, median(deep.captures) * spec.num_layers / DEEP)


class Answers:
    """A model of a few layers that answers random prompts."""

    def __init__(self, bench: PiecesBench, world: World, spec: ModelSpec, tp: int) -> None:
        self.world = world
        self.spec = replace(spec, max_positions=max(spec.max_positions, max(bench.prompts) + STEPS + 2))
        sizes = (tp, 1, world.size // tp)
        self.runtime = harness.random_model("model", self.spec, sizes, world, bench.dtype)
        self.runtime.freeze()
        self.captures: list[float] = []
        """Seconds of a graph, of each model run that recorded some."""

    def step(self, rows: int, prompt: int, graphs: bool) -> float:
        """Seconds of a decode pass: the median time from token to token of the first response."""
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, prompt)
        prompts = torch.randint(0, self.spec.vocab_size, shape, generator=generator).tolist()
        requests = [Request(one, row) for row, one in enumerate(prompts)]
        moments: list[float] = []

        def heard(request: int, token: int) -> None:
            if request == 0:
                moments.append(time.perf_counter())

        decoder, executor = self.runtime.decoder, self.runtime.executor
        with ModelRunner(decoder, graphs=graphs) as passes:
            for new in (3, 2 + STEPS):  # the first makes the cache, records, warms up
                moments.clear()
                device.meet(self.world)
                params = SamplingParams(max_new_tokens=new)
                generate(decoder, requests, params, executor, passes=passes, watch=heard)
            if passes.captures:
                self.captures.append(passes.capture_seconds / passes.captures)
        between = [after - before for before, after in itertools.pairwise(moments[1:-1])]
        return max(LEAST, device.most(self.world, median(between)))
