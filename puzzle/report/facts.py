"""What a report says of one run, taken from its folder: values ready to be shown, no words around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from puzzle.config.base import RunConfig
from puzzle.config.load import defaults, go_on, without_inherited
from puzzle.config.memory_report import estimate
from puzzle.config.renamed import modernised
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED
from puzzle.errors import UserError, describe
from puzzle.runlog.records import STAGES, End, Resume, Trace, Warned
from puzzle.runlog.run import Run

MOST_SAMPLE_BYTES = 256 << 20
"""Of samples.jsonl: what is larger is not read."""
SHOWN = 3
"""Samples of each kind."""


@dataclass(frozen=True)
class Setting:
    """What was given for a key, and what it would have been."""

    key: str
    value: Any
    default: Any


@dataclass(frozen=True)
class StageTime:
    """Mean seconds of a stage without the first iteration, its share, and what it could not be below:
    `bubble` is the share of it in which ranks idled by the schedule, `mfu` of the devices' rate that it used,
    `floor` its seconds at that rate."""

    name: str
    seconds: float
    share: float
    bubble: float | None
    mfu: float | None

    @property
    def floor(self) -> float | None:
        return None if self.mfu is None else self.mfu * self.seconds


@dataclass(frozen=True)
class StageMemory:
    """Most bytes of any rank in a stage, by the formula and as measured; None where that is not known."""

    name: str
    formula: int | None
    measured: int | None


@dataclass(frozen=True)
class Sample:
    """A response with its reward; `before` is the first evaluation's response to the same prompt."""

    iteration: int
    prompt: str
    response: str
    reward: float
    rewards: Mapping[str, float]
    before: str | None = None
    reward_before: float | None = None

    @property
    def gained(self) -> float:
        return self.reward - (self.reward if self.reward_before is None else self.reward_before)


@dataclass(frozen=True)
class Facts:
    """One run. `label` tells it from the others of a report."""

    label: str
    folder: Path
    run: Run

    @cached_property
    def status(self) -> str:
        """How it ended, in words."""
        last = next((one for one in reversed(self.run.records) if isinstance(one, End | Resume)), None)
        if not isinstance(last, End):
            return "not ended: it runs, or was killed"
        return last.status + (f": {last.text}" if last.text else "")

    @cached_property
    def timed(self) -> Sequence[Any]:
        """Iterations without the first one, which warms up."""
        return self.run.iterations[1:] or self.run.iterations

    @cached_property
    def seconds(self) -> float | None:
        """Mean seconds of an iteration."""
        return fmean(one.e2e_seconds for one in self.timed) if self.timed else None

    def series(self, name: str) -> list[tuple[float, float]]:
        """A metric, or a number of its speed, over iterations."""
        found = []
        for one in self.run.iterations:
            known = {**one.metrics, **(one.speed or {})}
            if name in known:
                found.append((float(one.iteration), known[name]))
        return found

    def mean(self, name: str) -> float | None:
        """The mean of a metric or a speed, without the first iteration."""
        known = [{**one.metrics, **(one.speed or {})} for one in self.timed]
        values = [one[name] for one in known if name in one and abs(one[name]) < 1e100]
        return fmean(values) if values else None

    @cached_property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order in which they come."""
        return list(dict.fromkeys(name for one in self.run.iterations for name in one.metrics))

    @cached_property
    def schema(self) -> type[RunConfig]:
        """What kind of run its configuration describes."""
        return SUPERVISED.get(self.run.config.get("task", ""), TrainConfig)

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """What the user gave, as far as the log says."""
        if self.run.given is not None:
            return self.run.given
        return without_inherited({k: v for k, v in self.run.config.items() if k != "global_batch_size"})

    @cached_property
    def settings(self) -> list[Setting]:
        """What was given and differs from the defaults."""
        usual = json.loads(json.dumps(defaults(self.schema), default=str))
        flat = dict(flattened(modernised(self.given)[0]))
        return [Setting(key, value, usual.get(key)) for key, value in flat.items() if usual.get(key) != value]

    @cached_property
    def stages(self) -> list[StageTime]:
        """Where the time of an iteration goes, `other` last."""
        if not self.timed:
            return []
        total = fmean(one.e2e_seconds for one in self.timed)
        found = []
        for name in STAGES:
            seconds = fmean(one.stage_seconds[name] for one in self.timed)
            if seconds > 0:
                share = seconds / total if total else 0.0
                found.append(StageTime(name, seconds, share, self._bubble(name), self.mean(f"mfu_{name}")))
        return found

    def _bubble(self, stage: str) -> float | None:
        """Of the last schedules of a stage, the mean share of idle time."""
        last = {one["name"]: one.get("bubble_share") for one in self.run.stages}
        shares = [v for name, v in last.items() if name.split(".")[0] == stage and v is not None]
        return fmean(shares) if shares else None

    @cached_property
    def memory(self) -> list[StageMemory]:
        """By stage, the fullest rank as the formula has it and as it was measured."""
        formula: dict[str, int] = {}
        try:
            config = go_on(self.schema, self.given, Path(self.run.source)).build(self.schema)
            ranks = estimate(resolve(config), fused=self.run.hardware.get("device") != "cpu")
            formula = {stage: max(rank.total(stage) for rank in ranks) for stage in ranks[0].stages}
        except UserError:
            pass  # its models are not here, or this version has no such configuration
        peaks = [rank.get("peak_bytes") or {} for rank in self.run.ranks]
        names = dict.fromkeys([*formula, *(stage for peak in peaks for stage in peak)])
        measured = {name: [peak[name] for peak in peaks if name in peak] for name in names}
        return [StageMemory(n, formula.get(n), max(measured[n], default=None)) for n in names]

    @cached_property
    def switch(self) -> dict[str, float]:
        """Means over the run's switches of what is a number in their records."""
        if not self.run.switches:
            return {}
        rows = [{"seconds": one.seconds, **one.fields} for one in self.run.switches]
        numbers = {
            key
            for row in rows
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        order = [key for key in rows[-1] if key in numbers]
        return {key: fmean(row[key] for row in rows if key in row) for key in order}

    @cached_property
    def warnings(self) -> list[tuple[str, int]]:
        """What the run warned of, and how often."""
        counts: dict[str, int] = {}
        for one in self.run.of(Warned):
            counts[one.text] = counts.get(one.text, 0) + 1
        return list(counts.items())

    @cached_property
    def restarts(self) -> list[Resume]:
        """Where it went on."""
        return list(self.run.of(Resume))

    @cached_property
    def traces(self) -> list[Path]:
        """Files with timelines that are there."""
        files = [self.folder / one.path for one in self.run.of(Trace)]
        return [file for file in dict.fromkeys(files) if file.is_file()]

    @cached_property
    def _samples(self) -> list[dict[str, Any]]:
        file = self.folder / "samples.jsonl"
        try:
            if not file.is_file() or file.stat().st_size > MOST_SAMPLE_BYTES:
                return []
            lines = file.read_text("utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(describe(error)) from None
        return [row for line in lines if (row := _row(line)) is not None]

    @cached_property
    def best_and_worst(self) -> tuple[list[Sample], list[Sample]]:
        """Of the last iteration's samples that are no evaluation's, by reward."""
        rows = [row for row in self._samples if not row.get("held_out")]
        last = max((row["iteration"] for row in rows), default=None)
        ordered = sorted((row for row in rows if row["iteration"] == last), key=lambda row: -row["reward"])
        some = min(SHOWN, len(ordered) // 2 or len(ordered))
        worst = ordered[-some:][::-1] if len(ordered) > 1 else []
        return [_sample(row) for row in ordered[:some]], [_sample(row) for row in worst]

    @cached_property
    def changed(self) -> list[Sample]:
        """Held-out prompts whose reward changed most from the first to the last evaluation, either way."""
        rows = [row for row in self._samples if row.get("held_out")]
        times = [row["iteration"] for row in rows]
        if not rows or times[0] == times[-1]:
            return []
        first, last = (
            {str(row.get("prompt_id")): row for row in rows if row["iteration"] == time}
            for time in (times[0], times[-1])
        )
        pairs = [_sample(row, first[key]) for key, row in last.items() if key in first]
        return sorted(pairs, key=lambda pair: -abs(pair.gained))[:SHOWN]


def _row(line: str) -> dict[str, Any] | None:
    """A line of samples that says all that is needed; None for another, as a killed process leaves it."""
    try:
        row = json.loads(line)
        good = isinstance(row["iteration"], int) and isinstance(row["reward"], int | float)
        return row if good and isinstance(row["prompt"], str) and isinstance(row["response"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _sample(row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Sample:
    parts = row.get("rewards")
    return Sample(
        row["iteration"],
        row["prompt"],
        row["response"],
        row["reward"],
        parts if isinstance(parts, Mapping) else {},
        None if before is None else before["response"],
        None if before is None else before["reward"],
    )


def flattened(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values by dotted key; lists are values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def differing(runs: Sequence[Facts]) -> dict[str, list[Any]]:
    """Settings in which the runs differ, each run's value; what a run has not is None."""
    flat = [dict(flattened(facts.run.config)) for facts in runs]
    names = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [one.get(key) for one in flat] for key in names}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
