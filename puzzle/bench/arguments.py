"""What measurements share: options of the command line, the model, the file that results go to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from puzzle.cli import Parser, new_file, whole
from puzzle.cli.plan_switch import model_spec, triple
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_LAYERS, MOST_MICROBATCHES, MOST_SEQUENCES, MOST_TOKENS
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": "7b", "help": "published size or Hugging Face folder"},
    "layers": {
        "type": whole(0, MOST_LAYERS),
        "default": 0,
        "metavar": "N",
        "help": "keep N decoder layers only",
    },
    "layout": {"type": triple, "default": (1, 1, 1), "metavar": "TP,PP,DP"},
    "rows": {"type": whole(1, MOST_SEQUENCES), "default": 4, "help": "sequences of a micro-batch"},
    "length": {"type": whole(1, MOST_TOKENS), "default": 512, "help": "tokens of a sequence"},
    "microbatches": {
        "type": whole(1, MOST_MICROBATCHES),
        "default": 4,
        "metavar": "M",
        "help": "per replica and step",
    },
    "recompute": {"action": "store_true", "help": "keep only layer inputs for the backward"},
    "repeats": {"type": whole(1), "default": 5, "metavar": "K", "help": "the median of K is reported"},
    "dtype": {"default": "bf16", "choices": sorted(DTYPES)},
    "device": {"default": "auto", "choices": ("auto", "cuda", "cpu")},
    "out": {"type": new_file, "metavar": "FILE", "help": "add the results to FILE, one JSON per line"},
}


def parser(what: str, description: str, options: str = "", **defaults: Any) -> Parser:
    """A parser with those of `OPTIONS` that are named, and the last three; defaults may be others."""
    made = Parser(f"puzzle bench {what}", description=description)
    for name in (*options.split(), "dtype", "device", "out"):
        default = {"default": defaults[name]} if name in defaults else {}
        made.add_argument(f"--{name}", **OPTIONS[name] | default)
    return made


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and in which numbers a measurement is made."""

    dtype: str
    device: str
    out: Path | None

    def leave(self, what: str, row: dict[str, Any]) -> None:
        """Add a result with the settings to the file, if there is one."""
        if self.out is None:
            return
        settings = {name: value for name, value in asdict(self).items() if name != "out"}
        with self.out.open("a") as file:
            file.write(json.dumps({"bench": what, **settings, **row}, default=str) + "\n")


def cut(model: str, layers: int, layouts: Sequence[tuple[int, int, int]] = ()) -> ModelSpec:
    """A model with `layers` decoder layers (0: its own number). UserError if it has fewer, or cannot be laid
    out in one of `layouts`."""
    spec = model_spec(model)
    if layers > spec.num_layers:
        raise UserError(f"--layers {layers}: {model} has {spec.num_layers}")
    spec = replace(spec, num_layers=layers or spec.num_layers)
    for layout in layouts:
        Layout.even(*layout, spec.num_layers).check(spec)
    return spec


@dataclass(frozen=True, kw_only=True)
class ModelBench(Bench):
    """A measurement of one model; `layers` 0 keeps the model's own number."""

    model: str
    layers: int

    @property
    def spec(self) -> ModelSpec:
        """The model, cut to `layers` layers if that is asked for."""
        return cut(self.model, self.layers)

    def leave(self, what: str, row: dict[str, Any]) -> None:
        """Add a result with the settings to the file, if there is one."""
        super().leave(what, {"layers": self.spec.num_layers} | row)


@dataclass(frozen=True, kw_only=True)
class LayoutBench(ModelBench):
    """A measurement of a model in one layout (tp, pp, dp)."""

    layout: tuple[int, int, int]

    def __post_init__(self) -> None:
        """Raise UserError, before any process starts, for a model that cannot be laid out so."""
        cut(self.model, self.layers, (self.layout,))

    @property
    def title(self) -> str:
        """What is measured, for people."""
        tp, pp, dp = self.layout
        return f"{self.model} {self.spec.num_layers} layers  tp{tp} pp{pp} dp{dp}"

    def runtime(self, world: World, recompute: bool = False) -> ModelRuntime:
        """This rank's part of the model, with random weights."""
        spec = self.spec
        placement = Placement.default(Layout.even(*self.layout, spec.num_layers))
        runtime = ModelRuntime("model", spec, placement, world, DTYPES[self.dtype], recompute)
        initialise(runtime.decoder, 0)
        return runtime
