"""`puzzle bench fuse`: several models in one pipeline, timed beside one after the other.

Costs come from the runs one after the other alone; what they let expect of one pipeline is simulated. The
costs of both parts of a split backward come from runs one after the other that split them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, ClassVar, Literal

import torch
from scipy.stats import t as student

from puzzle.bench import device, fit, harness
from puzzle.bench.harness import Row, option
from puzzle.bench.texts import last_values, mean_loss, mean_square_value, random_batches, token_logprobs
from puzzle.cli import named
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput, PipelineOutput
from puzzle.engine.runtime.tracing import Clock, gathered
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.plan.memory import RankMemory
from puzzle.plan.pipeline.actions import Op, Schedule
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.measured import measured_costs
from puzzle.plan.simulate.simulate import simulate
from puzzle.plan.simulate.timeline import Span, Timeline
from puzzle.spec.flops import forward_flops, train_flops
from puzzle.spec.model import ModelSpec

Stage = Literal["training", "inference"]
STAGES: dict[Stage, tuple[str, ...]] = {
    "training": ("actor", "critic"),
    "inference": ("reference", "critic", "reward"),
}
Way = Callable[[Sequence[PipelineInput]], list[PipelineOutput]]
HEAD = (
    "inference: apart has a collective of all ranks after each model, (apart) has none between\n"
    "stage        M  way            apart ms     way ms  simulated apart, way ms    way/sim  apart/sim"
    "  saved ms (95 %)           of simulated  MFU apart, way"
)


@dataclass(frozen=True, kw_only=True)
class FuseBench(harness.Bench):
    """Time several models in one pipeline; repeats are pairs of runs."""

    actor: Annotated[str, option(help="published size or Hugging Face folder; also reference")] = "7b"
    critic: Annotated[str, option(help="the same for critic and reward model")] = "7b"
    layers: harness.Layers = 0
    layout: harness.Placed = (1, 4, 1)
    stages: Annotated[Sequence[Stage], harness.several(*STAGES)] = tuple(STAGES)
    microbatches: Annotated[Sequence[int], harness.microbatches(nargs="+")] = (4, 8, 16, 32)
    rows: harness.Rows = 2
    length: harness.Length = 512
    dtype: harness.Dtype = "bf16"
    repeats: harness.Repeats = 5
    compile: Annotated[bool, option(help="fuse what lies between matrix products")] = False
    split: Annotated[bool, option(help="train with split backwards, too, both ways")] = False
    traces: Annotated[Path | None, option(type=named, metavar="DIR", help="leave Perfetto traces there")] = (
        None
    )
    traced: Annotated[int, harness.microbatches(help="micro-batches of traces")] = 8
    smaller: ClassVar[Mapping[str, str]] = {
        "activations": "lower --rows or --length",
        "logits": "lower --rows or --length",
        "": "give fewer --layers, a smaller --actor or --critic, or one of --stages",
    }

    def spec(self, role: str) -> ModelSpec:
        """The model of a role: the reference is the actor's size, the reward model the critic's."""
        language = role in ("actor", "reference")
        spec = harness.cut(self.actor if language else self.critic, self.layers, (self.layout,))
        return replace(spec, head="lm" if language else "value")

    def check(self) -> None:
        if self.repeats < 2:
            raise UserError("--repeats must be at least 2: the spread is reported")
        if self.split and self.layout[1] == 1:
            raise UserError("--split: one stage has nothing to fill; give --layout a pp of at least 2")
        for role in ("actor", "critic"):
            self.spec(role)

    def layouts(self) -> Sequence[harness.Sizes]:
        return (self.layout,)

    def trains(self, role: str) -> bool:
        """Whether a model has an optimizer."""
        return role in STAGES["training"] and "training" in self.stages

    def memory(self, world: World) -> RankMemory:
        """All models at once, in the stage that needs most."""
        itemsize, fused = harness.DTYPES[self.dtype].itemsize, world.device.type == "cuda"
        uses = [
            replace(
                fit.use(role, self.spec(role), self.layout, itemsize, fused),
                trained=self.trains(role),
                compiled=self.compile,
                split=self.split and self.trains(role),
            )
            for role in sorted({role for stage in self.stages for role in STAGES[stage]})
        ]
        sequences = max(self.microbatches) * self.rows * self.layout[2]
        return fit.steps(world.rank, uses, sequences, self.length, self.rows, self.stages)

    def measure(self, world: World) -> Iterator[Row | str]:
        team = Team(self, world)
        tp, pp, dp = self.layout
        where = f"{world.size} x {device.facts(world)['device']}, torch {torch.__version__}"
        models = f"{self.actor} + {self.critic}" + (f" cut to {self.layers} layers" if self.layers else "")
        work = f"micro-batches of {self.rows} x {self.length} tokens, {self.dtype}"
        yield f"{models}, tp{tp} pp{pp} dp{dp} on {where}\n{work}, {self.repeats} pairs of runs\n{HEAD}"
        for stage in self.stages:
            for count in self.microbatches:
                yield team.measured(stage, count)

    def line(self, row: Row) -> str:
        base, expected = row["base"], row["simulated"]
        found = {name: 1e3 * seconds for name, seconds in row["median_s"].items()}
        lines = []
        for name, compared in row["compared"].items():
            over = " ".join(f"{found[way] / 1e3 / expected[way]:9.3f}" for way in (name, base))
            low, high = (1e3 * x for x in compared["saved_ci95_s"])
            reached = "-" if compared["saving_reached"] is None else f"{compared['saving_reached']:.0%}"
            mfu = "-" if row["mfu"] is None else f"{row['mfu'][base]:.3f} {row['mfu'][name]:.3f}"
            lines.append(
                f"{row['stage']:<9}{row['microbatches']:5d}  {name:<12}{found[base]:11.1f}{found[name]:11.1f}"
                f"   {1e3 * expected[base]:10.1f} {1e3 * expected[name]:10.1f}    {over}"
                f"   {1e3 * compared['saved_s']:7.1f} ({low:.1f} to {high:.1f})   {reached:>7}   {mfu}"
                + (f"  (apart) {found['apart']:.1f} ms" if base != "apart" else "")
            )
        return "\n".join(lines)


class Team:
    """The models, their micro-batches, and the ways to run them."""

    def __init__(self, bench: FuseBench, world: World) -> None:
        self.bench, self.world = bench, world
        device.reset_peak(world.device)
        wanted = sorted({role for stage in bench.stages for role in STAGES[stage]})
        self.models = {role: self._model(role) for role in wanted}
        most = max(bench.microbatches)
        self.batches = {
            role: random_batches(model, most, bench.rows, bench.length)[1]
            for role, model in self.models.items()
        }

    def _model(self, role: str) -> ModelRuntime:
        bench = self.bench
        runtime = harness.random_model(role, bench.spec(role), bench.layout, self.world, bench.dtype)
        if bench.trains(role):
            runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
        else:
            runtime.freeze()
        if bench.compile:
            runtime.decoder.compile_layers()
        return runtime

    def _input(self, stage: Stage, role: str, count: int) -> PipelineInput:
        model, batches = self.models[role], self.batches[role][:count]
        language = model.spec.head == "lm"
        if stage == "inference":
            outputs = token_logprobs if language else last_values
            return PipelineInput(model, batches, outputs(model, batches))
        loss = mean_loss if language else mean_square_value
        total = count * self.bench.rows * self.bench.layout[2] * (self.bench.length - 1)
        return PipelineInput(model, batches, loss(model, batches, total))

    def ways(self, stage: Stage) -> dict[str, Way]:
        """How to run the passes of a stage; the first is what sharing is compared with."""
        shared = Pipeline([self.models[role] for role in STAGES[stage]])
        if stage == "training":
            ways: dict[str, Way] = {"apart": _trained, "fused": shared.train}
            more = {f"{name} split": partial(_split, way) for name, way in ways.items()}
            return ways | more if self.bench.split else ways
        # Without a collective between them, models apart follow each other without a flush on devices.
        flushed = partial(_inferred, flush=lambda: self.world.sum(torch.zeros(1, device=self.world.device)))
        return {"flushed": flushed, "apart": _inferred, "fused": shared.infer}

    def measured(self, stage: Stage, count: int) -> Row:
        """All ways of a stage with `count` micro-batches per model and replica, in alternation."""
        inputs = [self._input(stage, role, count) for role in STAGES[stage]]
        ways = {name: partial(way, inputs) for name, way in self.ways(stage).items()}
        peaks = {}
        for name, way in ways.items():  # compiles, connects, allocates
            device.reset_peak(self.world.device)
            device.measure(self.world, way, 1)
            peaks[name] = device.peak_bytes(self.world)
        timed = {name: partial(self._timed, way) for name, way in ways.items()}
        runs = device.alternated(timed, self.bench.repeats)
        seconds = {name: [run[0] for run in found] for name, found in runs.items()}
        spans = {name: [run[1] for run in found] for name, found in runs.items()}
        schedules = {name: found[-1][2] for name, found in runs.items()}
        base = next(iter(ways))
        cost = self._costs(spans[base], spans.get("apart split"))
        shown = [name for name in ways if name == base or name != "apart"]
        expected = {
            name: Timeline.after_one_another([simulate(s, cost) for s in schedules[name]]) for name in shown
        }
        if self.bench.traces is not None and count == self.bench.traced:
            seen = {name: gathered(self.world, spans[name][-1]) for name in shown}
            if self.world.rank == 0:
                _leave(self.bench.traces, stage, seen, expected)
        simulated = {name: timeline.makespan for name, timeline in expected.items()}
        medians = {name: median(x) for name, x in seconds.items()}
        flops = train_flops if stage == "training" else forward_flops
        lengths = [self.bench.length] * (count * self.bench.rows * self.bench.layout[2])
        total = sum(flops(self.models[role].spec, lengths) for role in STAGES[stage])
        rates = {name: device.mfu(self.world, total, x) for name, x in medians.items()}
        return {
            "stage": stage,
            "microbatches": count,
            "seconds": seconds,
            "simulated": simulated,
            "base": base,
            "median_s": medians,
            "compared": {n: _compared(seconds, simulated, base, n) for n in shown if n != base},
            "mfu": None if rates[base] is None else rates,
            "costs": cost.seconds,
            "flushes": {name: sum(s.flushes for s in ran) for name, ran in schedules.items()},
            "hashes": {name: [s.hash for s in ran] for name, ran in schedules.items()},
            "grad_norms": {n: m.optimizer.pop_grad_norms() for n, m in self.models.items() if m.optimizer},
            "peak_bytes": peaks,
        }

    def _costs(self, spans: Sequence[list[Span]], split: Sequence[list[Span]] | None = None) -> CostTable:
        """Of runs one after the other, from this rank's spans of each; those of the parts of a backward from
        runs that `split` it."""
        timelines = [gathered(self.world, part) for part in spans]
        placement = next(iter(self.models.values())).placement
        stage_of = {rank: placement.coord_of(rank).p for rank in placement.ranks}
        cost = measured_costs(Timeline.after_one_another(timelines), stage_of)
        if split is None:
            return cost
        parts, both = self._costs(split).seconds, (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        return CostTable(
            {model: {**own, **{op: parts[model][op] for op in both}} for model, own in cost.seconds.items()}
        )

    def _timed(self, work: Callable[[], list[PipelineOutput]]) -> tuple[float, list[Span], list[Schedule]]:
        """Seconds from when all start until the last device is done, this rank's spans, and what ran."""
        ran: dict[Schedule, None] = {}  # models of one pipeline have one schedule

        def clocked() -> None:
            self.world.clock = Clock(self.world.device)
            ran.update(dict.fromkeys(output.schedule for output in work()))

        (seconds,) = device.measure(self.world, clocked, 1)
        clock, self.world.clock = self.world.clock, None
        assert clock is not None
        return seconds, clock.passes(self.world.rank), list(ran)


def _trained(inputs: Sequence[PipelineInput]) -> list[PipelineOutput]:
    return [Pipeline([i.model]).train([i])[0] for i in inputs]


def _split(way: Way, inputs: Sequence[PipelineInput]) -> list[PipelineOutput]:
    """The same with split backwards."""
    try:
        for i in inputs:
            i.model.split_backward = True
        return way(inputs)
    finally:
        for i in inputs:
            i.model.split_backward = False


def _inferred(
    inputs: Sequence[PipelineInput], flush: Callable[[], object] = lambda: None
) -> list[PipelineOutput]:
    results = []
    for i in inputs:
        results += Pipeline([i.model]).infer([i])
        flush()
    return results


def _compared(seconds: dict[str, list[float]], simulated: dict[str, float], base: str, name: str) -> Row:
    """What a way saves: the mean over pairs of runs with its 95 % interval."""
    pairs = [a - b for a, b in zip(seconds[base], seconds[name], strict=True)]
    saved, possible = mean(pairs), simulated[base] - simulated[name]
    half = student.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5
    reached = saved / possible if possible > 0 else None
    return {"saved_s": saved, "saved_ci95_s": (saved - half, saved + half), "saving_reached": reached}


def _leave(folder: Path, stage: Stage, *seen: dict[str, Timeline]) -> None:
    """Traces of every way that is shown, measured and simulated."""
    folder.mkdir(parents=True, exist_ok=True)
    for timelines in seen:
        for name, timeline in timelines.items():
            file = folder / f"{stage}-{name.replace(' ', '-')}-{timeline.source}.json"
            file.write_text(json.dumps(timeline.to_perfetto(), separators=(",", ":")))
