"""What is irregular in the logs behind a figure: found in the logs, said beside the figure or mended.

Each function looks at one kind of irregularity and returns the grid with remarks on the pools concerned. With
`mend` it also puts a better run in place where the logs hold one, and the remark says what was done.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from puzzle.plotting.rows import Row
from puzzle.plotting.selection import (
    Grid,
    Panel,
    Pool,
    difference,
    is_time,
    late_mean,
    log_name,
    pair,
    series,
)
from puzzle.runlog.run import Run

PUBLISHED = "published"
CORRECTED = "corrected"
READINGS = (PUBLISHED, CORRECTED)

NOISE = 0.02
"""Runs of the same settings scatter by one to two percent: nearer than this is no other baseline."""


def each(pools: Grid, variant: str, fix: Callable[[Panel, Pool], Pool]) -> Grid:
    """The grid with `fix` applied to the pools of `variant`, published ones alone: it knows their habits."""
    return {
        panel: {
            config: {
                name: fix(panel, pool) if name == variant and panel.provenance == PUBLISHED else pool
                for name, pool in by_variant.items()
            }
            for config, by_variant in configs.items()
        }
        for panel, configs in pools.items()
    }


def without_reshard(pools: Grid, runs: Sequence[Run], mend: bool) -> Grid:
    """Runs called `opt` whose arguments keep the training layout for generation, as those of `gen_opt` do."""

    def fix(panel: Panel, pool: Pool) -> Pool:
        run = pool.runs[0]
        if reshards(run) is not False:
            return pool
        better = [
            other for other in alike(run, panel, runs) if reshards(other) and not difference(other, run)
        ]
        said = "the arguments of this log have re-sharding off, as gen_opt's do"
        return _answer(pool, better, mend, said, "one with re-sharding on", "e2e")

    return each(pools, "opt", fix)


def reshards(run: Run) -> bool | None:
    """Whether the actor generates in another layout than it trains in; None where the log does not say."""
    training, generation = run.layouts.get("training"), run.layouts.get("generation")
    return None if training is None or generation is None else training != generation


def altered_copies(pools: Grid, runs: Sequence[Run], mend: bool) -> Grid:
    """Logs that other figures hold too, by the same name, with other re-shard times."""

    def fix(panel: Panel, pool: Pool) -> Pool:
        run = pool.runs[0]
        mine = series(run, "reshard")
        copies = [other for other in alike(run, panel, runs) if log_name(other) == log_name(run)]
        better = [other for other in copies if series(other, "reshard") not in ((), mine)]
        said = "the logs of this run differ in their re-shard times"
        return _answer(pool, better, mend, said, "the other", "reshard") if better else pool

    return each(pools, "opt", fix)


def other_names(pools: Grid, baseline: str) -> Grid:
    """Without pairs that have no baseline and whose logs are also there as logs of a pair that has one."""
    return {
        panel: _named_once(configs, baseline) if panel.provenance == PUBLISHED else configs
        for panel, configs in pools.items()
    }


def _named_once(configs: Mapping[str, Mapping[str, Pool]], baseline: str) -> dict[str, dict[str, Pool]]:
    kept = {config: dict(by_variant) for config, by_variant in configs.items()}
    for config in [config for config in configs if baseline not in configs[config]]:
        copies = {
            variant: [
                other
                for other, theirs in configs.items()
                if baseline in theirs and variant in theirs and _one_log(pool, theirs[variant])
            ]
            for variant, pool in configs[config].items()
        }
        if all(copies.values()):
            del kept[config]
            for variant, others in copies.items():
                said = f"the same log as {configs[config][variant].logs[0]}, of a pair that has no baseline"
                kept[others[0]][variant] = kept[others[0]][variant].noted(said)
    return kept


def _one_log(pool: Pool, other: Pool) -> bool:
    """Whether two pools are of one log under two names."""
    one, two = pool.runs[0], other.runs[0]
    return (one.started, one.printed, one.config) == (two.started, two.printed, two.config)


def other_jobs(pools: Grid, runs: Sequence[Run], baseline: str, quantity: str, mend: bool) -> Grid:
    """Runs whose devices or global batch are not those of the baseline that they are set against."""
    result: Grid = {}
    for panel, configs in pools.items():
        result[panel] = {}
        for config, by_variant in configs.items():
            base = by_variant[baseline].runs[0] if baseline in by_variant else None
            result[panel][config] = {
                variant: pool if base is None else _same_job(panel, pool, base, runs, quantity, mend)
                for variant, pool in by_variant.items()
            }
    return result


def _same_job(panel: Panel, pool: Pool, base: Run, runs: Sequence[Run], quantity: str, mend: bool) -> Pool:
    run = pool.runs[0]
    different = difference(run, base)
    if not different:
        return pool
    others = [other for other in alike(run, panel, runs) if not difference(other, base)]
    better = [other for other in others if reshards(other) == reshards(run) and series(other, quantity)]
    said = f"this log and its baseline's are of different jobs ({different})"
    return _answer(pool, better, mend, said, "one of the same job", quantity)


def slower_baselines(pools: Grid, runs: Sequence[Run], baseline: str, mend: bool) -> Grid:
    """Baselines of which the logs hold a faster run of the same job."""

    def fix(panel: Panel, pool: Pool) -> Pool:
        run = pool.runs[0]
        mine = late_mean(run, "e2e")
        others = [other for other in alike(run, panel, runs) if not difference(other, run)]
        timed = [(time, other) for other in others if (time := late_mean(other, "e2e")) is not None]
        timed.sort(key=lambda item: item[0])
        faster = [other for time, other in timed if mine and time < (1 - NOISE) * mine]
        said = "baselines of this job differ among themselves"
        return _answer(pool, faster, mend, said, "the fastest", "e2e") if faster else pool

    return each(pools, baseline, fix)


def training_per_iteration(run: Run) -> tuple[float, ...]:
    """Training seconds per iteration; where only lines of single ranks are known, those that are not 0."""
    known = tuple(one.stage_seconds.get("training", math.nan) for one in run.iterations)
    if any(is_time(seconds) for seconds in known):
        return known
    return tuple(seconds for seconds in series(run, "training") if seconds > 0)


def alike(run: Run, panel: Panel, runs: Sequence[Run]) -> list[Run]:
    """Other logs of the same cluster, provenance, variant and pair, the newest first."""
    found = [
        other
        for other in runs
        if (other.cluster, other.provenance) == panel
        and (other.variant, pair(other)) == (run.variant, pair(run))
        and other.source != run.source
    ]
    found.sort(key=lambda other: other.source)
    return sorted(found, key=lambda other: other.started or "", reverse=True)


def _answer(pool: Pool, better: Sequence[Run], mend: bool, said: str, which: str, quantity: str) -> Pool:
    """The pool with the remark `said`; with `mend`, the first of `better` (it is `which`) in its place."""
    if not better:
        return pool.noted(said)
    mine, theirs = late_mean(pool.runs[0], quantity), late_mean(better[0], quantity)
    known = mine is not None and theirs is not None
    if mend:
        times = f" (mean {quantity} {theirs:.4g} s in place of {mine:.4g} s)" if known else ""
        mended = Pool((better[0],), tuple(_as_published(note) for note in pool.notes))
        return mended.noted(f"corrected: {which}, {better[0].source}{times}; as published: {said}")
    times = f" (mean {quantity} {theirs:.4g} s, here {mine:.4g} s)" if known else ""
    return pool.noted(f"{said}; {which}: {better[0].source}{times}")


def _as_published(note: str) -> str:
    """An earlier remark on a log that is no longer drawn."""
    return note if note.startswith("corrected: ") else f"as published: {note}"


def has_published(rows: Iterable[Row]) -> bool:
    """Whether any value comes from a published log."""
    return any(row.provenance == "published" and row.value is not None for row in rows)


def unstepped_critic(rows: Iterable[Row]) -> list[str]:
    """The remark on published time-sharing runs, if there are any."""
    if not has_published(rows):
        return []
    return [
        "In the published runs with ts only the actor's optimizer step is inside the schedule: the critic's "
        "never runs, and gradient clipping and overflow checks are off. This favours ts."
    ]
