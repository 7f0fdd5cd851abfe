"""What a search lays out and what it finds: from configurations to jobs, from choices to options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from puzzle.cli.simulated import lengths_of
from puzzle.cli.workloads import remapped, workload_of
from puzzle.config import memory_report as footprint
from puzzle.config.load import read_given
from puzzle.config.resolve import RunPlan, resolve
from puzzle.config.run import ROLES, TrainConfig
from puzzle.errors import UserError
from puzzle.files import jsonio
from puzzle.files.jsonio import Fields
from puzzle.plan.layout import Layout
from puzzle.plan.memory import RankMemory
from puzzle.plan.predict.calibration import Calibration
from puzzle.plan.predict.costs import Costs
from puzzle.plan.predict.iteration import Seconds, predict
from puzzle.plan.predict.job import Choice, Job, Role, Sizes
from puzzle.plan.predict.lengths import Lengths
from puzzle.plan.predict.search import Found, search
from puzzle.spec.model import ModelSpec

SCHEMA = 1
DEFAULT = "h200"
"""The calibration where none is given; it is printed."""
TOP = 10
"""Plans to show."""
EXACT = 32
"""Ranks up to which the switch of every plan that is shown is planned; beyond, memory is an upper bound."""
TIED = 0.02
"""Share of an iteration within which the model does not tell plans apart."""
SEARCHED = "the plan"
"""Where options stand that a search chose."""
MORE = 3
"""Times as many plans are searched as shown: some may turn out not to fit."""
Options = dict[str, Any]
"""Values by dotted keys of the configuration."""


@dataclass(frozen=True)
class Ranked:
    """A plan that was checked: options to run it with, what an iteration takes, the rank that needs most."""

    choice: Choice
    options: Options
    seconds: Seconds
    memory: RankMemory | int

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return self.memory if isinstance(self.memory, int) else self.memory.peak


@dataclass(frozen=True)
class Ranking:
    """Plans from the fastest on, and which of them is taken: the simplest of those tied with the fastest.
    `itemsize`: bytes of a weight."""

    plans: tuple[Ranked, ...]
    taken: int
    found: Found
    itemsize: int
    lengths: Lengths | None = None


def options_of(choice: Choice, given: Mapping[str, Any]) -> Options:
    """What a run of a choice is configured with, where `given` is what the user configured."""
    found: Options = {}

    def lay(key: str, sizes: Sizes) -> None:
        found.update(zip((f"{key}.{axis}" for axis in ("tp", "pp", "dp")), sizes, strict=True))
        own = _at(given, key)
        if isinstance(own, Mapping) and isinstance(own.get("stages"), list | tuple):
            found[f"{key}.stages"] = "even"

    lay("layout", choice.training)
    for role in ROLES:
        if _at(given, f"{role}.layout") is not None:
            lay(f"{role}.layout", choice.training)
    lay("generation.layout", choice.generation)
    if _at(given, "algorithm.microbatch_tokens") is not None:
        found["algorithm.microbatch_tokens"] = None
    found["algorithm.microbatch"] = choice.microbatch
    found["intra.fuse_training"] = choice.fuse_training
    found["intra.fuse_inference"] = choice.fuse_inference
    found["intra.split_backward"] = choice.split
    found["recompute"] = choice.recompute
    found["offload.optimizer"] = choice.offload
    found["generation.decode_microbatch"] = choice.decode
    found["generation.max_sequences"] = choice.slots
    for key, plain in (("switch.source", "gathered"), ("switch.overlap", "nothing")):
        if _at(given, key) not in (None, plain):
            found[key] = plain
    return found


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def rank_plans(
    file: Path,
    overrides: Sequence[str],
    gpus: int,
    per_node: int,
    calibration: Calibration,
    top: int,
    lengths: str | None = None,
    without: Sequence[str] = (),
) -> Ranking:
    """The `top` fastest plans of a configuration on `gpus` devices, each of them resolved and checked."""
    given = read_given(TrainConfig, file, overrides)  # whether or not its layouts are possible ones
    alone = options_of(Choice((1, 1, 1), (1, 1, 1), 1), given.values)
    plain = resolve(given.over(SEARCHED, alone).build(TrainConfig))
    costs = _on_nodes(calibration.costs, per_node)
    job = job_of(plain, gpus, per_node, calibration.memory_bytes)
    told = lengths_of(lengths, plain.batch.response)
    adapted = any(role.spec.lora is not None for role in job.roles)
    left = {*without, *(("split",) if adapted else ())}  # which the configuration refuses
    job = replace(job, work=replace(job.work, lengths=told), without=frozenset(left))
    found = search(job, costs, MORE * top if job.exact else top)
    plans: list[Ranked] = []
    tight: RankMemory | None = None
    for plan in found.plans:
        options = options_of(plan.choice, given.values)
        resolved = resolve(given.over(SEARCHED, options).build(TrainConfig), per_node)
        memory: RankMemory | int = plan.memory
        work = replace(workload_of(resolved), lengths=told, kept=job.keep)
        if job.exact:
            ranks = footprint.estimate(resolved, fused=job.fused)
            memory = max(ranks, key=lambda rank: rank.peak)
            if memory.peak > calibration.memory_bytes:
                tight = memory
                continue
            ranks = footprint.estimate(resolved, job.fused, calibration.memory_bytes)
            memory = max(ranks, key=lambda rank: rank.peak)
            work = remapped(work, ranks, calibration.memory_bytes)
        plans.append(Ranked(plan.choice, options, predict(work, costs), memory))
        if len(plans) == top:
            break
    if not plans:
        said = "" if tight is None else f": {footprint.remedy(tight)}"
        raise UserError(f"--gpus {gpus}: the {len(found.plans)} plans that might fit do not{said}")
    plans.sort(key=lambda plan: plan.seconds.total)
    tied = [plan for plan in plans if plan.seconds.total <= plans[0].seconds.total * (1 + TIED)]
    taken = min(tied, key=lambda plan: (plan.choice.complexity, plan.seconds.total))
    return Ranking(tuple(plans), plans.index(taken), found, plain.itemsize, told)


def _on_nodes(costs: Any, per_node: int) -> Costs:
    nodes = costs.nodes
    return costs if nodes is None else replace(costs, nodes=replace(nodes, devices=per_node))


def job_of(plan: RunPlan, gpus: int, per_node: int, memory: int) -> Job:
    """What a resolved run has to lay out on so many devices."""
    config: TrainConfig = plan.config
    roles = tuple(
        Role(role, m.spec, m.trained, not m.trained and getattr(config.offload, role), m.shares is not None)
        for role, m in plan.models.items()
    )
    balanced = config.layout.stages == "balanced"
    fused = config.device != "cpu"
    keep = fused and config.keeps_graphs is True

    @cache
    def layout(spec: ModelSpec, sizes: Sizes) -> Layout:
        return Layout.balanced(*sizes, spec) if balanced else Layout.even(*sizes, spec.num_layers)

    return Job(
        roles=roles,
        trained=plan.training.roles,
        inferred=plan.inference.roles,
        work=replace(workload_of(plan), kept=keep),
        layout=layout,
        ranks=gpus,
        per_node=min(per_node, gpus),
        memory=memory,
        itemsize=plan.itemsize,
        fused=fused,
        compiled=config.compile,
        staging=config.switch.staging_bytes,
        exact=gpus <= EXACT,
        keep=keep,
        invariant=config.numerics == "invariant",
        numerics_parts=config.numerics_parts,
    )


def described(
    ranking: Ranking, gpus: int, per_node: int, name: str, calibration: Calibration
) -> dict[str, Any]:
    """A ranking as JSON values: what `--json` prints, `--out` writes, and `puzzle train --plan` reads."""
    best = ranking.plans[ranking.taken]
    return {
        "schema": SCHEMA,
        "gpus": gpus,
        "per_node": per_node,
        "calibration": name,
        "engine": calibration.engine,
        "mean_response": None if ranking.lengths is None else ranking.lengths.mean,
        "taken": ranking.taken,
        "plans": [
            {
                "options": plan.options,
                "end_to_end": plan.seconds.total,
                "stages": vars(plan.seconds),
                "memory_bytes": plan.peak,
                "why": why(plan, best, ranking.plans[0]),
            }
            for plan in ranking.plans
        ],
        "choices": ranking.found.choices,
        "too_large": ranking.found.too_large,
        "notes": calibration.costs.notes(),
    }


def why(plan: Ranked, best: Ranked, fastest: Ranked) -> str:
    """In a line what speaks against a plan, or for it."""
    total = best.seconds.total
    if plan is best:
        return "taken: the fastest" if plan is fastest else "taken: the simplest of those as fast"
    more = plan.seconds.total / total - 1
    apart = {name: getattr(plan.seconds, name) - value for name, value in vars(best.seconds).items()}
    moved = sorted((name for name in apart if abs(apart[name]) >= 0.001), key=lambda name: -abs(apart[name]))
    stages = ", ".join(f"{name} {apart[name]:+.2f} s" for name in moved[:3]) or "the same seconds"
    if plan.seconds.total <= fastest.seconds.total * (1 + TIED):
        extra = plan.choice.complexity - best.choice.complexity
        return f"tied ({more:+.1%}: {stages})" + (", not as simple" if extra > 0 else "")
    return f"{more:+.1%}: {stages}"


def read_plan(path: Path) -> Options:
    """The options of the plan that a file of a search takes. UserError for what is none."""
    found = Fields(jsonio.read_object(path), str(path))
    if (schema := found.integer("schema", least=1)) != SCHEMA:
        raise UserError(f"{path}: schema is {schema}, this version reads {SCHEMA}; search again")
    plans = found.objects("plans")
    if not plans:
        found.refuse("plans", "plans of a search")
    taken = found.integer("taken", most=len(plans) - 1)
    options = plans[taken].section("options")
    known = options_of(Choice((1, 1, 1), (1, 1, 1), 1), {role: {"layout": {}} for role in ROLES})
    known |= dict.fromkeys(("algorithm.microbatch_tokens", "switch.source", "switch.overlap"))
    for key in options:
        if key not in known and not key.endswith("layout.stages"):
            raise UserError(f"{options.place}: {key} is no option of a plan; there are {', '.join(known)}")
        value = options.values[key]
        if not isinstance(value, int | str | None):
            options.refuse(key, "a number, true, false, a word or null")
    return dict(options.values)
