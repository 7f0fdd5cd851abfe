"""From iterations to means and ratios of means, with their spread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from puzzle.plotting.rows import RATIO, SECONDS, Row
from puzzle.plotting.selection import WARM_UP, Grid, Pool, cells, is_time, series, titles
from puzzle.plotting.selection import gap as planned_gap
from puzzle.runlog.run import Run

Values = Callable[[Run], Sequence[float]]
"""Gives a run's series of seconds, warm-up included."""


def of(quantity: str) -> Values:
    """The printed series of `quantity`."""
    return lambda run: series(run, quantity)


def minus(whole: str, part: str) -> Values:
    """`whole` without `part`, iteration by iteration, as far as both go (a log may be cut off)."""
    return lambda run: [
        total - less for total, less in zip(series(run, whole), series(run, part), strict=False)
    ]


@dataclass(frozen=True)
class Mean:
    """A mean with its spread; `value` is None where nothing was left to average, and `gap` says why.

    The gap of a quantity that no log gives, where logs give others, is "not timed"; that of a planned run is
    what its log says.
    """

    value: float | None
    n: int
    spread: float | None
    logs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    gap: str = ""


def mean(pool: Pool | None, values: Values) -> Mean:
    """Mean over the repeats of each repeat's mean over iterations, without the first iteration.

    The spread is the standard deviation over iterations, or over the repeats' means where there are several;
    `n` counts the same. Values that are no times (NaN, infinite, negative) are left out with a note.
    """
    if pool is None:
        return Mean(None, 0, None, (), gap="no log")
    notes = list(pool.notes)
    kept, logs = [], []
    for run in pool.runs:
        late = values(run)[WARM_UP:]
        good = [value for value in late if is_time(value)]
        if len(good) < len(late):
            notes.append(
                f"{run.source}: {len(late) - len(good)} of {len(late)} values are no times and are left out"
            )
        if good:
            kept.append(good)
            logs.append(run.source)
        elif len(pool.runs) > 1:
            notes.append(f"{run.source}: no value after the warm-up; this repeat is left out")
    if not kept:
        timed = any(len(values(run)) > 0 for run in pool.runs)
        others = any(given for run in pool.runs for given in run.printed.values())
        known = next(filter(None, map(planned_gap, pool.runs)), "")
        gap = known or ("not timed" if others and not timed else "no values")
        return Mean(None, 0, None, pool.logs, tuple(notes), gap=gap)
    means = [fmean(good) for good in kept]
    over = means if len(means) > 1 else kept[0]
    spread = stdev(over) if len(over) > 1 else None
    return Mean(fmean(means), len(over), spread, tuple(logs), tuple(notes))


def over(rows: Sequence[Row]) -> str:
    """What the spreads of these rows are taken over, in words."""
    repeated = {len(row.logs) > 1 for row in rows if row.spread is not None}
    if len(repeated) > 1:
        return "over iterations (over repeats where there are any)"
    return "over repeats" if repeated == {True} else "over iterations"


def whiskers(rows: Sequence[Row]) -> str:
    """The footnote on spread and count of bars that are ratios to a baseline."""
    return (
        f"Whiskers: one standard deviation {over(rows)} of the bar's own time. n: values averaged, in the "
        "order of the bars."
    )


def speedups(pools: Grid, labels: Mapping[str, str], baseline: str, values: Values) -> list[Row]:
    """Ratio rows mean(baseline) / mean(variant) for every cell, then the rows of seconds behind them.

    The spread of a ratio is that of its own mean alone, in the ratio's unit: a whisker is its bar's scatter.
    """
    ratios, seconds = [], []
    names = titles(pools)
    for panel, config, variant, pool in cells(pools, labels):
        own = mean(pool, values)
        base = mean(pools[panel][config].get(baseline), values)
        row = row_of(own, names[panel], config, labels[variant], panel.provenance)
        seconds.append(replace(row, notes=()))
        ratios.append(_ratio(row, own, base, variant == baseline))
    return ratios + seconds


def row_of(own: Mean, cluster: str, config: str, label: str, provenance: str) -> Row:
    """A mean in seconds as a row."""
    return Row(
        cluster=cluster,
        config=config,
        series=label,
        value=own.value,
        unit=SECONDS,
        n=own.n,
        spread=own.spread,
        logs=own.logs,
        provenance=provenance,
        notes=own.notes,
        gap=own.gap,
    )


def _ratio(row: Row, own: Mean, base: Mean, is_baseline: bool) -> Row:
    over_logs = () if is_baseline or not own.logs else base.logs
    if not own.value or not base.value:
        gap = own.gap or ("no baseline" if base.value is None else "zero time")
        return replace(row, value=None, unit=RATIO, spread=None, base_logs=over_logs, gap=gap)
    value = base.value / own.value
    spread = None if own.spread is None else value * own.spread / own.value
    return replace(row, value=value, unit=RATIO, spread=spread, base_logs=over_logs)
