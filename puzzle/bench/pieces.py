"""What passes are made of, measured piece by piece: layers and heads, the device's time and the host's apart.

Layers are those of a middle stage, so that nothing else is timed with them. Decode passes are in `decoding`.
"""

from __future__ import annotations

import gc
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
from puzzle.plan.pages import PAGE, kv_bytes, whole_pages
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
SHALLOW = 2
"""Layers of a model that is to be small, and the least of one whose decode passes are timed."""
STEPS = 16
"""Decode passes in a row that are timed."""
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

    def decoding(self, spec: ModelSpec, tp: int, count: int) -> tuple[int, int]:
        """Bytes of the weights of `count` layers on a tensor rank, and of what decode passes cache."""
        itemsize, cut = harness.DTYPES[self.dtype].itemsize, replace(spec, num_layers=count)
        layout = Layout.even(tp, 1, 1, count)
        cached = max(self.rows) * whole_pages(max(self.prompts), STEPS + 2, PAGE) * PAGE
        weights = weight_bytes(cut, layout, Coord(0, 0, 0), itemsize)
        return weights, kv_bytes(cut, layout, 0, cached, itemsize)

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
        for name, spec in zip(self.models, specs, strict=True):
            weights, cache = self.decoding(spec, 1, SHALLOW)
            stages[f"decode passes of {name}"] = {f"{name} weights": weights, "kv cache": cache}
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
    products: list[Callable[[], None]] = []

    def infer() -> None:
        with torch.no_grad():
            stage(x.detach(), batch)

    def forward() -> None:
        kept[:] = [stage(x, batch)]

    def backward() -> None:
        sums.begin(1)
        x.grad = None
        torch.autograd.backward(kept.pop(), gradient)

    def defer() -> None:
        """A backward that leaves the gradients of weights for later."""
        sums.begin(1)
        forward()
        with stage.later.deferring() as left:
            torch.autograd.backward(kept.pop(), gradient)
        products[:] = left

    def catch_up() -> None:
        with torch.no_grad():
            for add in products:
                add()

    infer_s, issue_infer_s = device.lanes(world, infer, bench.repeats)
    forward_s, issue_forward_s = device.lanes(world, forward, bench.repeats)
    backward_s, issue_backward_s = device.lanes(world, backward, bench.repeats, forward)
    weights_s, _ = device.lanes(world, catch_up, bench.repeats, defer)
    seconds = (infer_s, forward_s, backward_s, weights_s, issue_infer_s, issue_forward_s, issue_backward_s)
    each = [max(LEAST, value / LAYERS) for value in seconds]
    return LayerRow(Shape.of(spec), tp, len(texts) * length, length, *each)


def _head_row(bench: PiecesBench, world: World, stage: Decoder, spec: ModelSpec, tokens: int) -> HeadRow:
    tp = stage.layout.tp
    tokens = -(-tokens // tp) * tp
    hidden = torch.randn((tokens // tp, spec.hidden_size), device=world.device).to(stage.dtype)
    hidden.requires_grad_()
    rows = torch.arange(tokens, device=world.device)
    targets = rows % spec.vocab_size
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [stage.token_stats(hidden, rows, targets).logprobs.sum()]

    def infer() -> None:
        with torch.no_grad():
            forward()

    def backward() -> None:
        hidden.grad = stage.head_weight.grad = None
        kept.pop().backward()

    passes = (
        device.lanes(world, infer, bench.repeats),
        device.lanes(world, forward, bench.repeats),
        device.lanes(world, backward, bench.repeats, forward),
    )
    devices, hosts = ([max(LEAST, one) for one in lane] for lane in zip(*passes, strict=True))
    return HeadRow(spec.hidden_size, spec.vocab_size, tp, tokens, *devices, *hosts)
