"""The harness of all measurements: options, processes, lines for people, records for programs.

A bench is a subclass of `Bench` in a module of its name: its fields are its options, `measure` says what is
measured and `line` how that reads. The line that makes it a command is in `puzzle/cli/bench.py`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import torch

from puzzle.bench import device, fit
from puzzle.cli import Parser, new_file, whole
from puzzle.cli.plan_switch import model_spec, triple
from puzzle.config.memory_report import unless_skipped
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_LAYERS, MOST_MICROBATCHES, MOST_SEQUENCES, MOST_TOKENS
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.activations import Use
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import RankMemory
from puzzle.rlhf.preflight import SKIPS_MEMORY_CHECK
from puzzle.spec.model import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, Any]
"""What was measured, as the record has it."""


def option(**how: Any) -> dict[str, Any]:
    """The arguments of `add_argument`; `positional` for one without dashes."""
    return how


def several(*names: str, text: str | None = None) -> dict[str, Any]:
    """Some of `names`."""
    return option(nargs="+", choices=names, help=text)


Sizes = tuple[int, int, int]
"""tp, pp, dp."""
count = partial(option, type=whole(1, MOST_SEQUENCES))
tokens = partial(option, type=whole(1, MOST_TOKENS))
microbatches = partial(option, type=whole(1, MOST_MICROBATCHES), metavar="M")
Model = Annotated[str, option(help="published size or Hugging Face folder")]
Dtype = Annotated[str, option(choices=tuple(DTYPES))]
Layers = Annotated[int, option(type=whole(0, MOST_LAYERS), metavar="N", help="keep N decoder layers only")]
Placed = Annotated[Sizes, option(type=triple, metavar="TP,PP,DP")]
Rows = Annotated[int, count(help="sequences of a micro-batch")]
Length = Annotated[int, tokens(help="tokens of a sequence")]
Repeats = Annotated[int, option(type=whole(1), metavar="K", help="the median of K is reported")]
SHARED = "processes take the GPUs in turns where these are too few, and talk through the host: slow"
"""What --share-device says."""


def add_memory_check(parser: Parser) -> None:
    """The option of benches whose processes are those of runs, under the name that `check_memory` tells."""
    parser.add_argument(
        f"--{SKIPS_MEMORY_CHECK}",
        dest="skip_memory_check",
        choices=("true", "false"),
        default="false",
        help="true: begin with a warning where memory is counted as too little",
    )


def launch_of(options: Namespace) -> dict[str, Any]:
    """The section `launch` of such runs, by their command's options."""
    return {"share_device": options.share_device, "skip_memory_check": options.skip_memory_check}


@dataclass(frozen=True, kw_only=True)
class Bench(ABC):
    """A measurement, and where it is made; its command is named as its class, without "Bench"."""

    device: Annotated[str, option(choices=("auto", "cuda", "cpu"))] = "auto"
    out: Annotated[Path | None, option(type=new_file, help="add the results to it, one JSON per line")] = None
    skip_memory_check: Annotated[
        bool, option(help="begin with a warning where memory is counted as too little")
    ] = False
    timeout: ClassVar[float] = 600.0
    """Seconds that a rank waits for another."""
    smaller: ClassVar[Mapping[str, str]] = {"": "give fewer --layers or a smaller --model"}
    """Which option lowers what takes most memory, by the end of its name; "" stands for all others."""

    @classmethod
    def command(cls) -> str:
        """Its name on the command line and in records."""
        return cls.__name__.removesuffix("Bench").lower()

    @classmethod
    def run(cls, arguments: Sequence[str]) -> int:
        """Parse the command line and start the processes."""
        parser = Parser(f"puzzle bench {cls.command()}", description=cls.__doc__)
        hints = get_type_hints(cls, include_extras=True)
        for given in fields(cls):
            how = dict(hints[given.name].__metadata__[0])
            positional = how.pop("positional", False)
            if given.default is False:
                how["action"] = "store_true"
            elif given.default is not MISSING:
                how["default"] = given.default
            elif not positional:
                how["required"] = True
            parser.add_argument(given.name if positional else "--" + given.name.replace("_", "-"), **how)
        bench = cls(**vars(parser.parse_args(arguments)))
        bench.check()
        local.run("puzzle.bench.harness:work", (bench,), math.prod(bench.layouts()[0]))
        return 0

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Raise UserError, before any process starts, for what cannot be measured."""

    def layouts(self) -> Sequence[Sizes]:
        """What the processes are laid out as, all of one size."""
        return ((1, 1, 1),)

    def memory(self, world: World) -> RankMemory | None:
        """What this rank will need, at least; None where all that is made is small."""
        return None

    def join(self) -> World:
        """This process's place among all that measure."""
        return World.start(self.device, timeout=self.timeout)

    @abstractmethod
    def measure(self, world: World) -> Iterator[Row | str]:
        """What every process does: yields rows as soon as they are measured, and headings above them."""

    @abstractmethod
    def line(self, row: Row) -> str:
        """A row for people."""

    def settings(self) -> Row:
        """What the record says of the options."""
        return {name: value for name, value in asdict(self).items() if name != "out"}

    def report(self, found: Row | str, where: Row) -> None:
        """Print a heading or a row; add the row to the file, if there is one."""
        print(found if isinstance(found, str) else self.line(found), flush=True)
        if self.out is not None and not isinstance(found, str):
            record = {"bench": self.command(), **self.settings(), **found, "where": where}
            with self.out.open("a") as file:
                file.write(json.dumps(record, default=str) + "\n")


def work(bench: Bench) -> None:
    """What every process does; rank 0 reports."""
    with bench.join() as world:
        needed, free = bench.memory(world), world.free_memory()
        with unless_skipped(bench.skip_memory_check, "--skip-memory-check", world.warn):
            if needed is not None and free is not None:
                fit.require(f"bench {bench.command()}", needed, free, bench.smaller)
        for found in bench.measure(world):
            if world.rank == 0:
                bench.report(found, device.facts(world))


def cut(model: str, layers: int, layouts: Sequence[Sizes] = ()) -> ModelSpec:
    """A model with `layers` decoder layers (0: its own number). UserError if it has fewer, or cannot be laid
    out in one of `layouts`."""
    spec = model_spec(model)
    if layers > spec.num_layers:
        raise UserError(f"--layers {layers}: {model} has {spec.num_layers}")
    spec = replace(spec, num_layers=layers or spec.num_layers)
    for sizes in layouts:
        Layout.even(*sizes, spec.num_layers).check(spec)
    return spec


def random_model(name: str, spec: ModelSpec, sizes: Sizes, world: World, dtype: str) -> ModelRuntime:
    """This rank's part of a model in a layout, with random weights."""
    placement = Placement.default(Layout.even(*sizes, spec.num_layers))
    runtime = ModelRuntime(name, spec, placement, world, DTYPES[dtype])
    initialise(runtime.decoder, 0)
    return runtime


@dataclass(frozen=True, kw_only=True)
class ModelBench(Bench):
    """A measurement of one model; `layers` 0 keeps the model's own number."""

    model: Model = "7b"
    layers: Layers = 0
    dtype: Dtype = "bf16"

    def check(self) -> None:
        cut(self.model, self.layers, self.layouts())

    @property
    def spec(self) -> ModelSpec:
        """The model, cut to `layers` layers if that is asked for."""
        return cut(self.model, self.layers)

    def settings(self) -> Row:
        return super().settings() | {"layers": self.spec.num_layers}

    def use(self, name: str, sizes: Sizes, world: World) -> Use:
        """The model in a layout, as memory is counted."""
        fused = world.device.type == "cuda"
        return fit.use(name, self.spec, sizes, DTYPES[self.dtype].itemsize, fused)


@dataclass(frozen=True, kw_only=True)
class LayoutBench(ModelBench):
    """A measurement of a model in one layout."""

    layout: Placed = (1, 1, 1)

    def layouts(self) -> Sequence[Sizes]:
        return (self.layout,)

    @property
    def title(self) -> str:
        """What is measured, for people."""
        tp, pp, dp = self.layout
        return f"{self.model} {self.spec.num_layers} layers  tp{tp} pp{pp} dp{dp}"
