"""The kinds of records, a class each; docs/log-schema.md tells them for people.

A new kind is a class here, and whoever writes it: `writer.write(Switch(...))`. It is read by
`run.of(Switch)`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from puzzle.files.limits import MOST_NAME
from puzzle.runlog.record import Form, Record, is_count, is_number

SCHEMA = 1
STAGES = ("generation", "inference", "training", "switch", "other")
PROVENANCES = ("measured", "published", "simulated", "rehearsal")
UNFAITHFUL = "generation does not draw what the trained weights give"
"""How the warning of a run begins whose responses are not its model's; figures look for it."""
NO_HYBRID_ENGINE = "DeepSpeed-Chat without its Hybrid Engine"
"""How logs and figures name a baseline that transformers' `generate` generates for."""
# Stages add up to the end-to-end time within this share of it: published logs print ms with 3 decimals.
SUM_TOLERANCE = 1e-6
# Longer than any run; keeps sums of damaged numbers finite.
MOST_SECONDS = 1e9


FOR_PEOPLE = (
    "reward",
    "reward_min",
    "reward_max",
    "kl",
    "response_length",
    "truncated_frac",
    "actor_loss",
    "critic_loss",
    "explained_variance",
    "entropy",
    "actor_grad_norm",
    "tokens_per_device_second",
)
"""Metrics of an iteration that its line in `run.log` has, in this order."""


def readable(value: float) -> str:
    """Four digits that matter, without an exponent where people would not write one."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _is_seconds(value: object) -> bool:
    return is_number(value) and 0 <= value <= MOST_SECONDS


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _map(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _each(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda found: {name: make(value) for name, value in found.items()}


def _are_stages(value: object) -> bool:
    # What is left over may be a little negative where a log's own stage times exceed its end-to-end time.
    return (
        isinstance(value, dict)
        and set(value) == set(STAGES)
        and is_number(value["other"])
        and all(map(_is_seconds, {**value, "other": abs(value["other"])}.values()))
    )


Object = Annotated[Mapping[str, Any], Form("be an object", lambda value: isinstance(value, dict))]
Text = Annotated[str, Form("be a non-empty text", lambda value: _is_text(value) and value != "")]
AnyText = Annotated[str, Form("be a text or null", _is_text)]
Name = Annotated[
    str, Form(f"be a text of 1 to {MOST_NAME} characters", lambda v: _is_text(v) and 0 < len(v) <= MOST_NAME)
]
Texts = Annotated[tuple[str, ...], Form("be a list of texts", _list(_is_text), tuple, list)]
Count = Annotated[int, Form("be a whole number >= 0", is_count)]
Counts = Annotated[Mapping[str, int], Form("map names to whole numbers >= 0", _map(is_count))]
Number = Annotated[float, Form("be a finite number", is_number)]
Numbers = Annotated[tuple[float, ...], Form("be a list of finite numbers", _list(is_number), tuple, list)]
Seconds = Annotated[float, Form("be seconds >= 0", _is_seconds, float)]
# JSON has no NaN: null stands for it.
Metrics = Annotated[
    Mapping[str, float],
    Form(
        "map names to finite numbers or null",
        _map(lambda value: value is None or is_number(value)),
        _each(lambda value: math.nan if value is None else float(value)),
        _each(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value),
    ),
]
StageSeconds = Annotated[
    Mapping[str, float],
    Form(f"map exactly the keys {', '.join(STAGES)} to seconds >= 0", _are_stages, _each(float)),
]
SecondsByName = Annotated[
    Mapping[str, float], Form("map names to seconds >= 0", _map(_is_seconds), _each(float))
]
Schema = Annotated[int, Form(f"be {SCHEMA}, the version known here", lambda value: value == SCHEMA)]
Provenance = Annotated[str, Form(f"be one of {', '.join(PROVENANCES)}", lambda value: value in PROVENANCES)]


@dataclass(frozen=True, kw_only=True)
class RunHeader(Record, kind="run"):
    """What a run is; docs/log-schema.md says what each field holds.

    A writer needs `iterations` (planned) and `global_batch_size` (sequences per iteration) in `config`.
    """

    schema: Schema = SCHEMA
    run_id: Name
    repeat: Count = 0
    figures: Texts
    cluster: Name
    variant: Name
    actor: Name
    critic: Name | None
    config: Object
    layouts: Object
    provenance: Provenance
    software: Object
    hardware: Object
    git_commit: AnyText | None
    started: AnyText | None
    plan: Object = field(default_factory=dict)
    given: Object | None = None
    log: Object = field(default_factory=dict)

    @property
    def pair(self) -> str:
        """actor/critic, or the actor alone where there is no critic."""
        return self.actor if self.critic is None else f"{self.actor}/{self.critic}"


@dataclass(frozen=True)
class Rank(Record, kind="rank"):
    """What one rank is and holds; at the end once more with the bytes it moved per kind of collective, and on
    a GPU the memory it took."""

    rank: Count
    coordinates: Object | None = None
    parameter_bytes: Count | None = None
    device: Text | None = None
    collective_bytes: Counts | None = None
    peak_bytes: Counts | None = None
    device_bytes: Counts | None = None


@dataclass(frozen=True)
class Stage(Record, kind="stage"):
    """Which schedule a stage executes."""

    name: Text
    schedule: Text
    hash: Text
    actions: Counts | None = None
    flushes: Count | None = None
    bubble_share: Number | None = None


@dataclass(frozen=True)
class Iteration(Record, kind="iteration"):
    """One iteration. Stages exclude each other and add up to `e2e_seconds`; a metric may be NaN.
    `reward_seconds`: what reward functions computed, and what of it was waited for. `speed`: what another
    machine or another time has otherwise; metrics are the same wherever a run is repeated."""

    iteration: Count
    stage_seconds: StageSeconds
    e2e_seconds: Seconds
    metrics: Metrics
    reward_seconds: SecondsByName | None = None
    speed: Metrics | None = None

    def for_people(self) -> str:
        stages = {name: value for name, value in self.stage_seconds.items() if abs(value) >= 5e-4}
        parts = ", ".join(f"{name} {readable(value)}" for name, value in stages.items())
        known = {**self.metrics, **(self.speed or {})}
        told = ", ".join(f"{n} {readable(known[n])}" for n in FOR_PEOPLE if n in known)
        return f"iteration {self.iteration + 1}: {readable(self.e2e_seconds)} s ({parts}); {told}"

    def flaw(self) -> str | None:
        total = math.fsum(self.stage_seconds.values())
        if abs(total - self.e2e_seconds) <= SUM_TOLERANCE * self.e2e_seconds:
            return None
        return f"stage_seconds add up to {total:.6f} s, e2e_seconds is {self.e2e_seconds:.6f} s"


@dataclass(frozen=True)
class Evaluation(Record, kind="evaluation"):
    """Held-out metrics of the policy after `iteration` iterations; 0 is the policy before the first."""

    iteration: Count
    metrics: Metrics

    def for_people(self) -> str:
        shown = ", ".join(f"{name} {readable(value)}" for name, value in self.metrics.items())
        return f"held out after {self.iteration} iterations: {shown}"


@dataclass(frozen=True)
class Switch(Record, kind="switch"):
    """One change of the actor's layout (or a ZeRO-3 gather), inside the iteration `iteration`."""

    iteration: Count
    seconds: Seconds


@dataclass(frozen=True)
class Simulation(Record, kind="simulation"):
    """Seconds of one round of a stage by simulation, with an iteration's costs: `apart` and `fused`."""

    iteration: Count
    stage: Text
    seconds: Metrics


@dataclass(frozen=True)
class Offload(Record, kind="offload"):
    """What an iteration moved to the host and back."""

    iteration: Count
    seconds: Seconds
    copy_seconds: Seconds | None = None
    bytes: Count | None = None


@dataclass(frozen=True)
class Checkpoint(Record, kind="checkpoint"):
    """A complete checkpoint after `iteration`."""

    iteration: Count
    path: Text
    seconds: Seconds | None = None
    bytes: Count | None = None

    def for_people(self) -> str:
        return f"checkpoint after iteration {self.iteration}: {self.path}"


@dataclass(frozen=True)
class Resume(Record, kind="resume"):
    """The run goes on; `iteration` is the first one to come, `changed` what is other in its header."""

    iteration: Count
    checkpoint: AnyText | None = None
    changed: Object | None = None

    def for_people(self) -> str:
        return f"resumed at iteration {self.iteration} from {self.checkpoint}"


@dataclass(frozen=True)
class Warned(Record, kind="warning"):
    """Something that people should know."""

    text: Text
    iteration: Count | None = None

    def for_people(self) -> str:
        return f"warning: {self.text}" + ("" if self.iteration is None else f" (iteration {self.iteration})")


@dataclass(frozen=True)
class Trace(Record, kind="trace"):
    """A file with a timeline."""

    path: Text
    iteration: Count | None = None


GAP = "gap"
"""The kind of a note on a planned run that has no numbers; its text says why, in few words."""


@dataclass(frozen=True)
class Note(Record, kind="note"):
    """A remark on the numbers of a log."""

    kind: Text
    text: Text
    series: Texts | None = None
    indices: Numbers | None = None
    seconds: Number | None = None
    values: Numbers | None = None

    def for_people(self) -> str:
        return f"note: {self.text}"


@dataclass(frozen=True)
class Printed(Record, kind="printed"):
    """What a published plot script reads from the log of this run, iteration 0 first."""

    name: Text
    unit: Text
    values: Numbers


@dataclass(frozen=True)
class End(Record, kind="end"):
    """The run is over: `completed`, `failed` or `interrupted`."""

    status: Text
    text: Text | None = None

    def for_people(self) -> str:
        return f"end: {self.status}" + ("" if self.text is None else f": {self.text}")
