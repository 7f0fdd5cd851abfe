"""What the cost model predicts, from a configuration or from the log of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from puzzle.config.load import go_on, without_inherited
from puzzle.config.resolve import RunPlan, resolve
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.files.jsonio import Fields
from puzzle.files.limits import MOST_PROCESSES, MOST_SEQUENCES, MOST_TOKENS
from puzzle.plan.layout import Layout
from puzzle.plan.memory import RankMemory
from puzzle.plan.predict.iteration import Part, Seconds, Workload
from puzzle.plan.simulate.timeline import MOST_SECONDS
from puzzle.runlog.load import load_runs
from puzzle.runlog.run import Run
from puzzle.spec.published import published

NOT_PUZZLE = ("dschat", "theoretical")
"""Variants of logs that hold no run of this engine or of the published one."""
RECURSED = ("ppo", "reinforce_pp", "reinforce_pp_baseline", "remax")
"""Algorithms whose advantages follow one from another, position by position."""


@dataclass(frozen=True)
class Measured:
    """A run: what it did, and the seconds of an iteration."""

    run: Run
    work: Workload
    seconds: Seconds
    end_to_end: float
    plan: RunPlan | None = None
    """Of runs of this engine."""


def workload_of(plan: RunPlan) -> Workload:
    """What an iteration of a resolved run does."""
    config, batch = plan.config, plan.batch
    tokens, microbatch = config.algorithm.microbatch_tokens, config.algorithm.microbatch
    if tokens is not None:
        microbatch = max(1, tokens // (batch.prompt + batch.response))
    return Workload(
        actor=Part(plan.actor.spec, plan.actor.layout),
        generation=plan.generation.layout,
        trained=tuple(Part(model.spec, model.layout) for model in plan.training.models),
        inferred=tuple(Part(model.spec, model.layout) for model in plan.inference.models),
        stepped=len(plan.training.models),
        sequences=batch.sequences,
        minibatch=batch.minibatch,
        steps=batch.steps,
        prompt=batch.prompt,
        response=batch.response,
        microbatch=microbatch,
        prefill=config.generation.prefill_microbatch,
        decode=config.generation.decode_microbatch,
        fuse_training=plan.training.may_share,
        fuse_inference=plan.inference.may_share,
        split=config.intra.split_backward,
        recompute=config.recompute,
        offload=config.offload.optimizer,
        early_stop=config.generation.early_stop,
        slots=config.generation.max_sequences,
        samples=config.generation.samples,
        prefill_tokens=config.generation.prefill_tokens,
        graphs=config.generation.graphs and config.device != "cpu",
        recursed=batch.response if config.algorithm.name in RECURSED else 0,
    )


def remapped(work: Workload, ranks: Sequence[RankMemory], memory: int) -> Workload:
    """With what a rank of `memory` bytes gives back between training and generation, and takes anew; nothing
    where the cache is kept, beside which training fits."""
    if all(rank.cache is not None and rank.cache.kept for rank in ranks):
        return replace(work, kept=True)
    most = 0
    for rank in ranks:
        resident = sum(rank.resident.values())
        training, generation = (rank.total(stage) - resident for stage in ("training", "generation"))
        if resident + training + generation > memory:
            most = max(most, training)
    return replace(work, remapped=float(most))


def measured_runs(paths: Sequence[Path]) -> list[Measured]:
    """All runs under the paths that have timed stages; of logs with the same numbers the first. UserError if
    there are none."""
    found: dict[tuple[object, ...], Measured] = {}
    for path in paths:
        for run in load_runs(path).runs:
            if run.variant in NOT_PUZZLE or "inference" not in run.printed:
                continue
            found.setdefault((run.cluster, *run.printed["e2e"]), _measured(run))
    if not found:
        raise UserError(f"no run of PUZZLE with timed stages under {', '.join(map(str, paths))}")
    return list(found.values())


def _measured(run: Run) -> Measured:
    """Means without the first iteration, a warm-up; of inference of published runs the least, as single
    iterations stall there, for half a second and more."""
    series = {name: values[1:] or values for name, values in run.printed.items()}
    for name in ("e2e", "generation", "inference", "training"):
        values = series.get(name)
        if not values or not all(0 < value < MOST_SECONDS for value in values):
            raise UserError(f"{run.source}: seconds of {name} must be positive and below {MOST_SECONDS:g}")
    switch = fmean(series["reshard"]) if "reshard" in series else 0.0
    inference = (min if run.provenance == "published" else fmean)(series["inference"])
    seconds = Seconds(fmean(series["generation"]) - switch, inference, fmean(series["training"]), switch)
    plan = None if run.provenance == "published" else _plan_of_run(run)
    work = _published_workload(run) if plan is None else workload_of(plan)
    return Measured(run, work, seconds, fmean(series["e2e"]), plan)


def _plan_of_run(run: Run) -> RunPlan:
    given = run.given
    if given is None:
        given = without_inherited({key: v for key, v in run.config.items() if key != "global_batch_size"})
    if "keep_graphs" not in run.config["generation"]:  # by an engine that recorded graphs in every iteration
        given = {**given, "generation": {**given.get("generation", {}), "keep_graphs": False}}
    return resolve(go_on(TrainConfig, given, Path(run.source)).build(TrainConfig))


def _published_workload(run: Run) -> Workload:
    config, actor = Fields(run.config, run.source), published(run.actor)
    critic = replace(published(run.critic or run.actor), head="value")
    training = _layout(run, "training")
    generation = _layout(run, "generation") if "generation" in run.layouts else training
    policy = Part(actor, Layout.even(*training, actor.num_layers))
    judge = Part(critic, Layout.even(*training, critic.num_layers))
    bulk, batch = config.flag("bulk"), config.integer("global_batch_size", least=1, most=MOST_SEQUENCES)

    def count(key: str, most: int = MOST_SEQUENCES) -> int:
        return config.integer(key, least=1, most=most)

    return Workload(
        actor=policy,
        generation=Layout.even(*generation, actor.num_layers),
        trained=(policy, judge),
        inferred=(policy, judge, judge),  # the reference is of the actor's size, the reward of the critic's
        stepped=1 if bulk else 2,  # the critic's step is not in the published bulk schedule
        sequences=batch,
        minibatch=batch,
        steps=1,
        prompt=count("max_prompt_tokens", MOST_TOKENS),
        response=count("max_new_tokens", MOST_TOKENS),
        microbatch=count("micro_batch_size"),
        prefill=count("prefill_microbatch"),
        decode=count("decode_microbatch"),
        fuse_training=bulk,
    )


def _layout(run: Run, stage: str) -> tuple[int, int, int]:
    """tp, pp and dp of a published run; UserError where its log does not say."""
    cut = Fields(run.layouts, f"{run.source}: layouts").section(stage)
    tp, pp, dp = (cut.integer(axis, least=1, most=MOST_PROCESSES) for axis in ("tp", "pp", "dp"))
    return tp, pp, dp
