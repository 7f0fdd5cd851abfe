"""`puzzle bench fuse`: several models in one pipeline, timed beside one after the other.

Costs come from the runs one after the other alone; what they let expect of one pipeline is simulated. The
costs of both parts of a split backward come from runs one after the other that split them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import t as student
from torch import Tensor

from puzzle.bench import device
from puzzle.bench.arguments import DTYPES, Bench, cut, parser
from puzzle.bench.texts import mean_loss, mean_square_value, random_batches, token_logprobs
from puzzle.cli import named, whole
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput, PipelineOutput
from puzzle.engine.pipeline.stage import OutputFn
from puzzle.engine.runtime.tracing import Clock, gathered
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.files.limits import MOST_MICROBATCHES
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
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


@dataclass(frozen=True, kw_only=True)
class FuseBench(Bench):
    """What is measured; `layers` 0 keeps the models' own numbers."""

    actor: str
    critic: str
    layers: int
    layout: tuple[int, int, int]
    stages: Sequence[Stage]
    microbatches: Sequence[int]
    rows: int
    length: int
    order: Literal["sequential", "alternating"]
    repeats: int
    compile: bool
    split: bool
    traces: Path | None
    traced: int

    def spec(self, role: str) -> ModelSpec:
        """The model of a role: the reference is the actor's size, the reward model the critic's."""
        language = role in ("actor", "reference")
        spec = cut(self.actor if language else self.critic, self.layers, (self.layout,))
        return replace(spec, head="lm" if language else "value")


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    made = parser(
        "fuse",
        "Time several models in one pipeline; repeats are pairs of runs.",
        "layers layout rows length repeats",
        layout=(1, 4, 1),
        rows=2,
    )
    made.add_argument("--actor", default="7b", help="published size or Hugging Face folder; also reference")
    made.add_argument("--critic", default="7b", help="the same for critic and reward model")
    made.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    made.add_argument(
        "--microbatches",
        nargs="+",
        type=whole(1, MOST_MICROBATCHES),
        default=[4, 8, 16, 32],
        metavar="M",
    )
    made.add_argument("--order", default="sequential", choices=("sequential", "alternating"))
    made.add_argument("--compile", action="store_true", help="fuse what lies between matrix products")
    made.add_argument("--split", action="store_true", help="train with split backwards, too, both ways")
    made.add_argument("--traces", type=named, metavar="DIR", help="leave Perfetto traces there")
    made.add_argument(
        "--traced", type=whole(1, MOST_MICROBATCHES), default=8, metavar="M", help="micro-batches of traces"
    )
    bench = FuseBench(**vars(made.parse_args(arguments)))
    if bench.repeats < 2:
        raise UserError("--repeats must be at least 2: the spread is reported")
    if bench.split and bench.layout[1] == 1:
        raise UserError("--split: one stage has nothing to fill; give --layout a pp of at least 2")
    for role in ("actor", "critic"):
        bench.spec(role)
    local.run("puzzle.bench.fuse:work", (bench,), math.prod(bench.layout))
    return 0


def work(bench: FuseBench) -> None:
    """What every process does; rank 0 prints a line per measurement as soon as it is made."""
    with World.start(bench.device) as world:
        team = Team(bench, world)
        if world.rank == 0:
            print(_title(bench, world), flush=True)
        for stage in bench.stages:
            for count in bench.microbatches:
                row = team.measured(stage, count)
                if world.rank == 0:
                    _report(bench, row)


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
        self.placement = next(iter(self.models.values())).placement

    def _model(self, role: str) -> ModelRuntime:
        spec, trained = self.bench.spec(role), role in STAGES["training"]
        placement = Placement.default(Layout.even(*self.bench.layout, spec.num_layers))
        runtime = ModelRuntime(role, spec, placement, self.world, DTYPES[self.bench.dtype])
        initialise(runtime.decoder, 0)
        if trained and "training" in self.bench.stages:
            runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-6))
        else:
            runtime.freeze()
        if self.bench.compile:
            runtime.decoder.compile_layers()
        return runtime

    def _input(self, stage: Stage, role: str, count: int) -> PipelineInput:
        model, batches = self.models[role], self.batches[role][:count]
        sequences = count * self.bench.rows * model.placement.layout.dp
        output_fn: OutputFn
        if stage == "training":
            loss = mean_loss if model.spec.head == "lm" else mean_square_value
            output_fn = loss(model, batches, sequences * (self.bench.length - 1))
        elif model.spec.head == "lm":
            output_fn = token_logprobs(model, batches)
        else:

            def output_fn(index: int, hidden: Tensor) -> Tensor:
                return model.decoder.values(hidden)[batches[index].last_rows]

        return PipelineInput(model, batches, output_fn)

    def ways(self, stage: Stage) -> dict[str, Way]:
        """How to run the passes of a stage; the first is what sharing is compared with."""
        shared = Pipeline([self.models[role] for role in STAGES[stage]])
        if stage == "training":
            ways: dict[str, Way] = {"apart": _trained, "fused": partial(shared.train, order=self.bench.order)}
            more = {f"{name} split": partial(_split, way) for name, way in ways.items()}
            return ways | more if self.bench.split else ways
        # Without a collective between them, models apart follow each other without a flush on devices.
        flushed = partial(_inferred, flush=self._flush)
        return {
            "flushed": flushed,
            "apart": _inferred,
            "fused": partial(shared.infer, order=self.bench.order),
        }

    def _flush(self) -> None:
        self.world.sum(torch.zeros(1, device=self.world.device))

    def measured(self, stage: Stage, count: int) -> dict[str, Any]:
        """All ways of a stage with `count` micro-batches per model and replica, in alternation."""
        inputs = [self._input(stage, role, count) for role in STAGES[stage]]
        ways = self.ways(stage)
        peaks = {}
        for name, way in ways.items():  # compiles, connects, allocates
            device.reset_peak(self.world.device)
            device.measure(self.world, partial(way, inputs), 1)
            peaks[name] = device.peak_bytes(self.world)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        spans: dict[str, list[list[Span]]] = {name: [] for name in ways}
        results: dict[str, list[PipelineOutput]] = {}
        for _ in range(self.bench.repeats):
            for name, way in ways.items():
                taken, marked, results[name] = self._timed(partial(way, inputs))
                seconds[name].append(taken)
                spans[name].append(marked)
        base = next(iter(ways))
        cost = self._costs(spans[base], spans.get("apart split"))
        shown = [name for name in ways if name == base or name.startswith("fused") or stage == "training"]
        expected = {
            name: Timeline.after_one_another([simulate(s, cost) for s in _schedules(results[name])])
            for name in shown
        }
        if self.bench.traces is not None and count == self.bench.traced:
            seen = {name: gathered(self.world, spans[name][-1]) for name in shown}
            self._leave(self.bench.traces, stage, seen, expected)
        simulated = {name: timeline.makespan for name, timeline in expected.items()}
        return {
            "stage": stage,
            "models": [f"{role} {model.spec.num_layers} layers" for role, model in self._of(stage).items()],
            "microbatches": count,
            "seconds": seconds,
            "simulated": simulated,
            "base": base,
            "median_s": {name: statistics.median(x) for name, x in seconds.items()},
            "over_simulated": {name: statistics.median(seconds[name]) / x for name, x in simulated.items()},
            "compared": {n: _compared(seconds, simulated, base, n) for n in shown if n != base},
            "mfu": self._mfu(stage, count, seconds),
            "costs": cost.seconds,
            "flushes": {n: sum(s.flushes for s in _schedules(r)) for n, r in results.items()},
            "hashes": {n: [s.hash for s in _schedules(r)] for n, r in results.items()},
            "grad_norms": {n: m.optimizer.pop_grad_norms() for n, m in self.models.items() if m.optimizer},
            "peak_bytes": peaks,
            "where": device.facts(self.world),
        }

    def _costs(self, spans: Sequence[list[Span]], split: Sequence[list[Span]] | None = None) -> CostTable:
        """Of runs one after the other, from this rank's spans of each; those of the parts of a backward from
        runs that `split` it."""
        timelines = [gathered(self.world, part) for part in spans]
        stage_of = {rank: self.placement.coord_of(rank).p for rank in self.placement.ranks}
        cost = measured_costs(Timeline.after_one_another(timelines), stage_of)
        if split is None:
            return cost
        parts, both = self._costs(split).seconds, (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        return CostTable(
            {model: {**own, **{op: parts[model][op] for op in both}} for model, own in cost.seconds.items()}
        )

    def _of(self, stage: Stage) -> dict[str, ModelRuntime]:
        return {role: self.models[role] for role in STAGES[stage]}

    def _timed(
        self, work: Callable[[], list[PipelineOutput]]
    ) -> tuple[float, list[Span], list[PipelineOutput]]:
        """Seconds from when all start until the last device is done, this rank's spans, and results."""
        results: list[PipelineOutput] = []

        def clocked() -> None:
            self.world.clock = Clock(self.world.device)
            results.extend(work())

        (seconds,) = device.measure(self.world, clocked, 1)
        clock, self.world.clock = self.world.clock, None
        assert clock is not None
        return seconds, clock.passes(self.world.rank), results

    def _mfu(self, stage: Stage, count: int, seconds: dict[str, list[float]]) -> dict[str, float] | None:
        peak = device.peak_flops(self.world.device)
        if peak is None:
            return None
        flops = train_flops if stage == "training" else forward_flops
        lengths = [self.bench.length] * (count * self.bench.rows * self.placement.layout.dp)
        total = sum(flops(model.spec, lengths) for model in self._of(stage).values())
        return {n: total / statistics.median(x) / self.world.size / peak for n, x in seconds.items()}

    def _leave(
        self, folder: Path, stage: Stage, seen: dict[str, Timeline], expected: dict[str, Timeline]
    ) -> None:
        """Traces of every way that is shown, measured and simulated."""
        if self.world.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for timelines in (seen, expected):
            for name, timeline in timelines.items():
                file = folder / f"{stage}-{name.replace(' ', '-')}-{timeline.source}.json"
                file.write_text(json.dumps(timeline.to_perfetto(), separators=(",", ":")))


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
    inputs: Sequence[PipelineInput], flush: Callable[[], None] = lambda: None
) -> list[PipelineOutput]:
    results = []
    for i in inputs:
        results += Pipeline([i.model]).infer([i])
        flush()
    return results


def _schedules(results: Sequence[PipelineOutput]) -> list[Schedule]:
    """What ran; models of one pipeline have one schedule."""
    return list(dict.fromkeys(r.schedule for r in results))


def _compared(
    seconds: dict[str, list[float]], simulated: dict[str, float], base: str, name: str
) -> dict[str, Any]:
    """What a way saves: the mean over pairs of runs with its 95 % interval."""
    pairs = [a - b for a, b in zip(seconds[base], seconds[name], strict=True)]
    saved = statistics.mean(pairs)
    half = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    possible = simulated[base] - simulated[name]
    return {
        "saved_s": saved,
        "saved_ci95_s": (saved - half, saved + half),
        "saving_reached": saved / possible if possible > 0 else None,
    }


HEAD = (
    "stage        M  way            apart ms     way ms  simulated apart, way ms    way/sim  apart/sim"
    "  saved ms (95 %)           of simulated  MFU apart, way"
)


def _title(bench: FuseBench, world: World) -> str:
    tp, pp, dp = bench.layout
    where = f"{world.size} x {device.facts(world)['device']}, torch {torch.__version__}"
    models = f"{bench.actor} + {bench.critic}" + (f" cut to {bench.layers} layers" if bench.layers else "")
    work = f"micro-batches of {bench.rows} x {bench.length} tokens, {bench.dtype}, {bench.order}"
    note = "inference: apart has a collective of all ranks after each model, (apart) has none between"
    return f"{models}, tp{tp} pp{pp} dp{dp} on {where}\n{work}, {bench.repeats} pairs of runs\n{note}\n{HEAD}"


def _report(bench: FuseBench, row: dict[str, Any]) -> None:
    base, expected, over = row["base"], row["simulated"], row["over_simulated"]
    median = {name: seconds * 1e3 for name, seconds in row["median_s"].items()}
    other = f"  (apart) {median['apart']:.1f} ms" if base != "apart" else ""
    for name, compared in row["compared"].items():
        sizes = f"{expected[base] * 1e3:10.1f} {expected[name] * 1e3:10.1f}"
        low, high = (x * 1e3 for x in compared["saved_ci95_s"])
        reached = "      -" if compared["saving_reached"] is None else f"{compared['saving_reached']:7.0%}"
        mfu = "-" if row["mfu"] is None else f"{row['mfu'][base]:.3f} {row['mfu'][name]:.3f}"
        print(
            f"{row['stage']:<9}{row['microbatches']:5d}  {name:<12}{median[base]:11.1f}{median[name]:11.1f}"
            f"   {sizes}    {over[name]:9.3f} {over[base]:9.3f}"
            f"   {compared['saved_s'] * 1e3:7.1f} ({low:.1f} to {high:.1f})   {reached}   {mfu}{other}",
            flush=True,
        )
    bench.leave("fuse", row)
