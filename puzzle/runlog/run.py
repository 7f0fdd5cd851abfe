"""What a reader gives back: runs as immutable values, the same for our logs and for published ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = ("generation", "inference", "training", "switch", "other")
PROVENANCES = ("measured", "published", "simulated", "rehearsal")
UNFAITHFUL = "generation does not draw what the trained weights give"
"""How the warning of a run begins whose responses are not its model's; figures look for it."""


@dataclass(frozen=True)
class Iteration:
    """One PPO iteration. Stages exclude each other and add up to `e2e_seconds`; a metric may be NaN."""

    iteration: int
    stage_seconds: Mapping[str, float]
    e2e_seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of the policy after `iteration` iterations; 0 is the policy before the first."""

    iteration: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Switch:
    """One change of the actor's layout (or a ZeRO-3 gather), inside the iteration `iteration`."""

    iteration: int
    seconds: float
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Something a reader dropped, repaired or preferred. `line` counts from 1; None: the whole file."""

    source: str
    line: int | None
    what: str


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What a run is; docs/log-schema.md says what each field holds.

    A writer needs `iterations` (planned) and `global_batch_size` (sequences per iteration) in `config`.
    """

    run_id: str
    repeat: int = 0
    figures: tuple[str, ...]
    cluster: str
    variant: str
    actor: str
    critic: str | None
    config: Mapping[str, Any]
    layouts: Mapping[str, Any]
    provenance: str
    software: Mapping[str, Any]
    hardware: Mapping[str, Any]
    git_commit: str | None
    started: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] | None = None

    @property
    def pair(self) -> str:
        """actor/critic, or the actor alone where there is no critic."""
        return self.actor if self.critic is None else f"{self.actor}/{self.critic}"


@dataclass(frozen=True, kw_only=True)
class Run(RunHeader):
    """One run of one variant.

    `iterations` are in order; after a resume the last of each index counts. `printed` holds, per quantity,
    the numbers as the published plot scripts read them from the log of this run, in log order, iteration 0
    included, in seconds: `e2e`, `generation`, `inference`, `training`, `reshard` (PUZZLE), `gather` and
    `experience` (DeepSpeed-Chat), `training_speedup` (a ratio, variant "theoretical"). A quantity that was
    never printed has no key. `notes` are remarks on the numbers: `kind`, `text`, and where they apply
    `series` (keys of `printed`), `indices` (places in those series), `seconds`, `values`. `started` is
    ISO 8601 with a zone. `source` is the path of the log, or the name of the published log.
    """

    source: str
    iterations: tuple[Iteration, ...]
    switches: tuple[Switch, ...]
    stages: tuple[Mapping[str, Any], ...] = ()
    ranks: tuple[Mapping[str, Any], ...] = ()
    simulations: tuple[Mapping[str, Any], ...] = ()
    offloads: tuple[Mapping[str, Any], ...] = ()
    printed: Mapping[str, tuple[float, ...]]
    notes: tuple[Mapping[str, Any], ...]
    reports: tuple[Report, ...]
    ended: bool
    evaluations: tuple[Evaluation, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """All runs under a folder, and what was wrong that belongs to no single run."""

    runs: tuple[Run, ...]
    reports: tuple[Report, ...]
