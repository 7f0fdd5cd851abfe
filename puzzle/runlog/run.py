"""What a reader gives back: runs as immutable values, the same for our logs and for published ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from puzzle.runlog import records as kinds
from puzzle.runlog.record import Record
from puzzle.runlog.records import Evaluation, Iteration, Resume, RunHeader, Switch

Kind = TypeVar("Kind", bound=Record)
_Indexed = TypeVar("_Indexed", Iteration, Evaluation)


@dataclass(frozen=True)
class Report:
    """Something a reader dropped, repaired or preferred. `line` counts from 1; None: the whole file."""

    source: str
    line: int | None
    what: str


@dataclass(frozen=True, kw_only=True)
class Run(RunHeader):
    """One run of one variant: its header, and what its `records` say, in log order.

    `source` is the path of the log, or the name of the published log.
    """

    source: str
    records: tuple[Record, ...]
    reports: tuple[Report, ...]

    def of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """All records of a kind, those of attempts that a resume went back behind too."""
        return tuple(record for record in self.records if isinstance(record, kind))

    @cached_property
    def iterations(self) -> tuple[Iteration, ...]:
        """In order; after a resume the last of each index counts."""
        return _last_of_each(self.of(Iteration))

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """In order; the last of each index counts."""
        return _last_of_each(self.of(Evaluation))

    @cached_property
    def switches(self) -> tuple[Switch, ...]:
        """By iteration, those of the last attempt that had any."""
        attempt, latest = 0, dict[int, tuple[int, list[Switch]]]()
        for record in self.records:
            if isinstance(record, Resume):
                attempt += 1
            elif isinstance(record, Switch):
                known = latest.get(record.iteration)
                found = known[1] if known is not None and known[0] == attempt else []
                latest[record.iteration] = (attempt, [*found, record])
        return tuple(switch for index in sorted(latest) for switch in latest[index][1])

    @cached_property
    def ranks(self) -> tuple[Mapping[str, Any], ...]:
        """What each rank told, later fields added to earlier ones."""
        told: dict[int, dict[str, Any]] = {}
        for rank in self.of(kinds.Rank):
            told.setdefault(rank.rank, {}).update(rank.to_json())
        return tuple(told[rank] for rank in sorted(told))

    @property
    def stages(self) -> tuple[Mapping[str, Any], ...]:
        """Which schedules ran."""
        return tuple(record.to_json() for record in self.of(kinds.Stage))

    @property
    def simulations(self) -> tuple[Mapping[str, Any], ...]:
        """What stages take by simulation."""
        return tuple(record.to_json() for record in self.of(kinds.Simulation))

    @property
    def offloads(self) -> tuple[Mapping[str, Any], ...]:
        """What iterations offloaded."""
        return tuple(record.to_json() for record in self.of(kinds.Offload))

    @property
    def notes(self) -> tuple[Mapping[str, Any], ...]:
        """Remarks on the numbers: `kind`, `text`, and where they apply `series` (keys of `printed`),
        `indices` (places in those series), `seconds`, `values`."""
        return tuple(record.to_json() for record in self.of(kinds.Note))

    @cached_property
    def printed(self) -> Mapping[str, tuple[float, ...]]:
        """Per quantity the numbers as the published plot scripts read them from the log of this run, in log
        order, iteration 0 included, in seconds: `e2e`, `generation`, `inference`, `training`, `reshard`
        (PUZZLE), `gather` and `experience` (DeepSpeed-Chat), `training_speedup` (a ratio, variant
        "theoretical"). A quantity that was never printed has no key."""
        found = {record.name: tuple(map(float, record.values)) for record in self.of(kinds.Printed)}
        return found or printed_series(self.variant, self.iterations)

    @property
    def ended(self) -> bool:
        """Whether the last process said so."""
        last = next((one for one in reversed(self.records) if isinstance(one, kinds.End | Resume)), None)
        return isinstance(last, kinds.End)


@dataclass(frozen=True)
class Loaded:
    """All runs under a folder, and what was wrong that belongs to no single run."""

    runs: tuple[Run, ...]
    reports: tuple[Report, ...]


def _last_of_each(found: Iterable[_Indexed]) -> tuple[_Indexed, ...]:
    last = {one.iteration: one for one in found}
    return tuple(last[index] for index in sorted(last))


def missing(found: Iterable[int]) -> str | None:
    """Which iterations from 0 on are not among those found; None where none is missing."""
    order = sorted(set(found))
    gap = next((place for place, index in enumerate(order) if place != index), None)
    return None if gap is None else f"{order[-1] + 1 - len(order)} iterations are missing, the first is {gap}"


def printed_series(variant: str, iterations: Iterable[Iteration]) -> Mapping[str, tuple[float, ...]]:
    """What the lines of `run.log` say, per quantity, unrounded: a switch counts as generation there."""
    rows = [(one.stage_seconds, one.e2e_seconds) for one in iterations]
    if not rows:
        return {}
    switches = tuple(stages["switch"] for stages, _ in rows)
    series = {
        "e2e": tuple(e2e for _, e2e in rows),
        "generation": tuple(stages["generation"] + stages["switch"] for stages, _ in rows),
        "training": tuple(stages["training"] for stages, _ in rows),
    }
    if variant == "dschat":
        series["experience"] = tuple(
            stages["generation"] + stages["switch"] + stages["inference"] for stages, _ in rows
        )
    else:
        series["inference"] = tuple(stages["inference"] for stages, _ in rows)
    # Where nothing switched, or nobody timed it, there is no time of a switch: that is not a switch of 0 s.
    return {**series, "gather" if variant == "dschat" else "reshard": switches} if any(switches) else series
