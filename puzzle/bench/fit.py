"""Whether what a bench makes fits into memory, by the formulas of `puzzle.plan`, before any of it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puzzle.config.memory_report import unit_of
from puzzle.engine.runtime.free_memory import FreeMemory
from puzzle.errors import UserError
from puzzle.plan.activations import FP32, Use
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import RankMemory, Switched, Work, rank_memory
from puzzle.spec.model import ModelSpec


def use(name: str, spec: ModelSpec, sizes: tuple[int, int, int], itemsize: int, fused: bool) -> Use:
    """A model in a layout (tp, pp, dp); `fused`: on CUDA."""
    return Use(name, spec, Placement.default(Layout.even(*sizes, spec.num_layers)), itemsize, fused=fused)


def steps(
    rank: int, uses: Sequence[Use], sequences: int, length: int, microbatch: int, stages: Sequence[str]
) -> RankMemory:
    """Steps on random texts, of which every token but the first is learned: `sequences` of `length` tokens
    over all replicas, `microbatch` of them in a pass."""
    work = Work(sequences, sequences, 1, length - 1, microbatch)
    shared = sum(one.trained for one in uses) > 1
    found = rank_memory(rank, uses, None, work, Switched(), shared)
    return RankMemory(rank, found.resident, {name: found.stages[name] for name in stages})


def without_states(found: RankMemory, one: Use) -> RankMemory:
    """The same where gradients are only summed in float32 (`train.GradientSum`)."""
    weights = found.resident[f"{one.name} weights"]
    stages = {name: dict(terms) for name, terms in found.stages.items()}
    stages["training"][f"{one.name} gradients"] = weights // one.itemsize * FP32
    return RankMemory(found.rank, {f"{one.name} weights": weights}, stages)


def require(command: str, found: RankMemory, free: FreeMemory, smaller: Mapping[str, str]) -> None:
    """UserError, naming the largest term and what lowers it (by the end of its name; "" for all others), if
    a rank needs more than is free."""
    if found.peak <= free.bytes:
        return
    (name, size), (unit, scale) = found.largest, unit_of(found.peak)
    advice = next(text for end, text in smaller.items() if name.endswith(end))
    raise UserError(
        f"{command}: rank {found.rank} needs {found.peak / scale:.1f} {unit}, {free.told}"
        f" {free.bytes / scale:.1f}; most of it, {size / scale:.1f} {unit}, is {name}: {advice}"
    )
