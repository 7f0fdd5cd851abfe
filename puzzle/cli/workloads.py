"""What the cost model predicts, from a configuration or from the log of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from puzzle.config.load import go_on, without_inherited
from puzzle.config.resolve import RunPlan, resolve
from puzzle.errors import UserError
from puzzle.plan.layout import Layout
from puzzle.plan.predict.iteration import Part, Seconds, Workload
from puzzle.runlog.load import load_runs
from puzzle.runlog.run import Run
from puzzle.spec.published import published

NOT_PUZZLE = ("dschat", "theoretical")
"""Variants of logs that hold no run of this engine or of the published one."""


@dataclass(frozen=True)
class Measured:
    """A run: what it did, and the seconds of an iteration."""

    run: Run
    work: Workload
    seconds: Seconds
    end_to_end: float


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
    )


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
    """Means without the first iteration, a warm-up; of inference the least, as single iterations stall."""
    series = {name: values[1:] or values for name, values in run.printed.items()}
    switch = fmean(series["reshard"]) if "reshard" in series else 0.0
    seconds = Seconds(
        fmean(series["generation"]) - switch, min(series["inference"]), fmean(series["training"]), switch
    )
    return Measured(run, _workload_of_run(run), seconds, fmean(series["e2e"]))


def _workload_of_run(run: Run) -> Workload:
    if run.provenance != "published":
        given = run.given
        if given is None:
            given = without_inherited({key: v for key, v in run.config.items() if key != "global_batch_size"})
        return workload_of(resolve(go_on(given, Path(run.source), [])[0]))
    config, actor = run.config, published(run.actor)
    critic = replace(published(run.critic or run.actor), head="value")

    def layout(stage: str, layers: int) -> Layout:
        cut = run.layouts.get(stage) or run.layouts["training"]
        return Layout.even(cut["tp"], cut["pp"], cut["dp"], layers)

    policy = Part(actor, layout("training", actor.num_layers))
    judge = Part(critic, layout("training", critic.num_layers))
    bulk = bool(config["bulk"])
    return Workload(
        actor=policy,
        generation=layout("generation", actor.num_layers),
        trained=(policy, judge),
        inferred=(policy, judge, judge),  # the reference is of the actor's size, the reward of the critic's
        stepped=1 if bulk else 2,  # the critic's step is not in the published bulk schedule
        sequences=config["global_batch_size"],
        minibatch=config["global_batch_size"],
        steps=1,
        prompt=config["max_prompt_tokens"],
        response=config["max_new_tokens"],
        microbatch=config["micro_batch_size"],
        prefill=config["prefill_microbatch"],
        decode=config["decode_microbatch"],
        fuse_training=bulk,
    )
