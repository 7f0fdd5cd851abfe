"""A predicted iteration as a log of ours and as a timeline; and how long responses are to be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from puzzle.config.resolve import RunPlan
from puzzle.errors import UserError
from puzzle.files import durable, jsonio
from puzzle.files.jsonio import Fields
from puzzle.files.limits import MOST_TOKENS
from puzzle.files.reading import read_text
from puzzle.plan.pipeline.actions import COLLECTIVES, Payload, Schedule
from puzzle.plan.pipeline.schedules import PipelineModel, forward_only, one_f_one_b
from puzzle.plan.predict.calibration import Calibration
from puzzle.plan.predict.costs import Costs
from puzzle.plan.predict.iteration import (
    Part,
    Seconds,
    Workload,
    generation_seconds,
    pipeline_costs,
    step_seconds,
    switch_seconds,
)
from puzzle.plan.predict.lengths import Lengths
from puzzle.plan.predict.recurrences import StageCosts
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import simulate
from puzzle.plan.simulate.timeline import Span, Timeline
from puzzle.rlhf.provenance import run_header
from puzzle.runlog.records import End, Iteration
from puzzle.runlog.writer import RunWriter

MOST_PASSES = 8192
"""Of a stage of the iteration in a timeline; more are one span per pipeline stage."""
Named = Mapping[str, Part]


def lengths_of(text: str | None, most: int) -> Lengths | None:
    """What `--lengths` says: `fixed`, `exponential:MEAN`, or a file of `puzzle generate` or of one number a
    line. UserError for anything else."""
    if text is None or text == "fixed":
        return None
    kind, _, number = text.partition(":")
    if kind == "exponential":
        try:
            mean = float(number)
        except ValueError:
            mean = math.nan
        if not 1 <= mean <= MOST_TOKENS:
            raise UserError(f"--lengths {text}: give a mean from 1 to {MOST_TOKENS}, as exponential:200")
        return Lengths.exponential(mean, most)
    path = Path(text)
    if not path.is_file():
        raise UserError(f"--lengths {text}: no such file; or give fixed, or exponential:MEAN")
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    return Lengths.observed([_length(line, f"{path}:{i + 1}") for i, line in enumerate(lines)], most)


def _length(line: str, place: str) -> int:
    value = jsonio.parse(line, place)
    if isinstance(value, dict):
        ids = Fields(value, place).values.get("response_ids")
        value = len(ids) if isinstance(ids, list) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise UserError(f"{place}: must be a response with response_ids, or how many tokens it has")
    return value


def write_log(
    out: Path, plan: RunPlan, work: Workload, seconds: Seconds, name: str, calibration: Calibration
) -> None:
    """A log of `provenance: simulated` in `out`, all iterations alike, and a timeline of one of them."""
    made = run_header(plan, {"device": calibration.device, "processes": plan.world})
    told = {"engine": calibration.engine, "calibration": name}
    header = replace(made, provenance="simulated", software={**made.software, **told})
    stages = {**asdict(seconds), "other": 0.0}
    with RunWriter(out, header) as writer:
        for iteration in range(plan.config.iterations):
            writer.write(Iteration(iteration, stages, sum(stages.values()), {}))
        writer.write(End("completed"))
    durable.make_folder(out / "traces")
    trace = timeline(work, calibration.costs, plan).to_perfetto()
    durable.write_text(out / "traces" / "iteration-0.json", json.dumps(trace))


def timeline(work: Workload, costs: Costs, plan: RunPlan) -> Timeline:
    """One iteration by pipeline stage, one minibatch of it: switch, generation, then every pass."""
    trained = dict(zip(plan.training.roles, work.trained, strict=True))
    inferred = dict(zip(plan.inference.roles, work.inferred, strict=True))
    parts = [
        _phase("switch", switch_seconds(work, costs), work.generation.pp),
        _phase("generation", generation_seconds(work, costs), work.generation.pp),
        *_passes(inferred, work, costs, False),
        *_passes(trained, work, costs, True),
    ]
    return Timeline.after_one_another(parts)


def _phase(name: str, seconds: float, stages: int) -> Timeline:
    spans = tuple(Span(stage, "compute", name, 0.0, seconds, "stage") for stage in range(stages))
    return Timeline(spans)


def _passes(named: Named, work: Workload, costs: Costs, trained: bool) -> list[Timeline]:
    """The schedules of a stage, one or several after another."""
    together = work.fuse_training if trained else work.fuse_inference
    groups: Sequence[Sequence[str]] = [list(named)] if together else [[name] for name in named]
    found = []
    for names in groups:
        parts = [named[name] for name in names]
        sequences = work.minibatch if trained else work.sequences
        stages, counts = pipeline_costs(parts, work, sequences, costs, trained)
        if len(stages[0].forward) * sum(counts) > MOST_PASSES:
            continue
        models = [PipelineModel(name, count) for name, count in zip(names, counts, strict=True)]
        table = CostTable(
            {
                name: _table(one.alone(), step_seconds(part, costs) if trained else 0.0)
                for name, one, part in zip(names, stages, parts, strict=True)
            }
        )
        found.append(simulate(_schedule(models, len(stages[0].forward), work, trained), table))
    return found


def _schedule(models: Sequence[PipelineModel], pp: int, work: Workload, trained: bool) -> Schedule:
    if not trained:
        return forward_only(models, pp)
    return one_f_one_b(models, pp, split=work.split)


def _table(one: StageCosts, step: float) -> dict[str, float | tuple[float | None, ...]]:
    """Messages and collectives are inside passes and the step."""
    weights = one.weights or (0.0,) * len(one.forward)
    backward = one.backward or weights
    rest = tuple(a - b for a, b in zip(backward, weights, strict=True))
    free = dict.fromkeys(map(str, (*COLLECTIVES, *Payload)), 0.0)
    return {
        **free,
        "forward": one.forward,
        "backward": backward,
        "backward_input": rest,
        "backward_weight": weights,
        "step": step,
    }
