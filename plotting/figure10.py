"""Figure 10: training-stage speed-up of time-sharing over layouts and batch sizes, beside theory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.figure import Figure

from puzzle.plotting import bars, irregularities, selection, stats
from puzzle.plotting.irregularities import CORRECTED
from puzzle.plotting.rows import RATIO, Row, by_cluster, drawn, span
from puzzle.plotting.selection import Grid, Pool, is_time
from puzzle.plotting.stats import Mean, row_of
from puzzle.plotting.style import OURS, Look
from puzzle.runlog.run import Run

NAME = "figure10"
TITLE = "training by layout, times as fast as without time-sharing"
BASE, OPT, THEORY = "wo_bulk", "w_bulk", "theoretical"
SECONDS = {BASE: "PUZZLE w/o ts", OPT: "PUZZLE w/ ts"}
LOOKS = {"PUZZLE": Look(OURS), "Theoretical": Look("#ffffff", "////")}
SPEEDUP = "training_speedup"


def config_of(run: Run) -> str:
    """`ACTOR/CRITIC bsBATCH (PP,DP,TP)`: the one place where layouts are written in the published order."""
    training = run.layouts.get("training")
    axes = training if isinstance(training, Mapping) else {}
    layout = ",".join(str(axes.get(axis, "?")) for axis in ("pp", "dp", "tp"))
    return f"{selection.pair(run)} bs{run.config.get('global_batch_size', '?')} ({layout})"


def order(config: str) -> tuple[float, ...]:
    """By pair, batch, then data and tensor parallelism."""
    batch, pp, dp, tp = (float(number) for number in _figures(config))
    return (*selection.pair_order(config), batch, dp, tp, pp)


def _figures(config: str) -> tuple[str, ...]:
    match = re.search(r" bs(\d+) \((\d+),(\d+),(\d+)\)$", config)
    return match.groups() if match else ("0",) * 4


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """mean training(without) / mean training(with), with the theoretical value, and the seconds behind.

    Source of the spread: largest distance of an iteration's ratio from the last iteration's.
    """
    grid = _joined(selection.grid(runs, NAME, (*SECONDS, THEORY), config_of, order))
    titles = selection.titles(grid)
    rows = stats.speedups(grid, SECONDS, BASE, stats.of("training"))
    result = [row for row in rows if row.unit != RATIO]
    panels = {title: panel for panel, title in titles.items()}
    bars_of = [row for row in rows if row.unit == RATIO and row.series == SECONDS[OPT]]
    for row in reversed(bars_of):
        panel = panels[row.cluster]
        pools = grid[panel][row.config]
        spread = None if row.value is None else _spread(pools[BASE], pools[OPT], row.spread)
        theory = row_of(_theory(pools, reading), row.cluster, row.config, "Theoretical", panel.provenance)
        result[:0] = [replace(row, series="PUZZLE", spread=spread), replace(theory, unit=RATIO)]
    return result


def headline(rows: Sequence[Row]) -> str:
    """The measured speed-ups, per cluster."""
    return by_cluster([row for row in drawn(rows, RATIO) if row.series == "PUZZLE"], span)


def _joined(grid: Grid) -> Grid:
    """Simulated theory moves to the runs of its cluster and configuration that have no other."""
    for panel in [panel for panel in grid if panel.provenance == "simulated"]:
        for config, pools in list(grid[panel].items()):
            hosts = [
                other
                for other in grid
                if other.cluster == panel.cluster and other != panel and config in grid[other]
            ]
            lacking = [grid[host][config] for host in hosts if THEORY not in grid[host][config]]
            if THEORY in pools and hosts:
                for host in lacking:
                    host[THEORY] = pools[THEORY]
                del pools[THEORY]
            if not pools:
                del grid[panel][config]
        if not grid[panel]:
            del grid[panel]
    return grid


def _spread(base: Pool, own: Pool, over_repeats: float | None) -> float | None:
    if len(base.runs) > 1 or len(own.runs) > 1:
        return over_repeats
    return ratio_range(selection.series(base.runs[0], "training"), selection.series(own.runs[0], "training"))


def ratio_range(without: Sequence[float], with_sharing: Sequence[float]) -> float | None:
    """max over iterations of |last iteration's ratio - that iteration's ratio|, the warm-up left out."""
    pairs = list(zip(without, with_sharing, strict=False))[selection.WARM_UP :]
    ratios = [one / other for one, other in pairs if is_time(one) and is_time(other) and other]
    return max((abs(ratios[-1] - ratio) for ratio in ratios), default=None)


def lacking(runs: Sequence[Run]) -> set[tuple[str, str]]:
    """Cluster and configuration of published runs that came without a theoretical value."""
    mine = [run for run in runs if NAME in run.figures and run.provenance == "published"]
    known = {(run.cluster, config_of(run)) for run in mine if run.variant == THEORY}
    return {(run.cluster, config_of(run)) for run in mine if run.variant in SECONDS} - known


def constants(runs: Sequence[Run], wanted: set[tuple[str, str]]) -> list[Run]:
    """The published theoretical values among `runs` for the wanted clusters and configurations."""
    return [
        run
        for run in runs
        if (NAME in run.figures and run.variant == THEORY) and (run.cluster, config_of(run)) in wanted
    ]


def _theory(pools: Mapping[str, Pool], reading: str) -> Mean:
    run = next(pools[variant].runs[0] for variant in (OPT, BASE, THEORY) if variant in pools)
    ideal = equal_cost_speedup(run) if reading == CORRECTED and run.provenance == "published" else None
    if ideal is not None:
        note = (
            "corrected: 2(M+P-1)/(2M+P-1) for P stages and M micro-batches of two models of equal cost, "
            "without optimizer steps and communication, in place of the published constant"
        )
        return Mean(ideal, 0, None, (run.source,), (note,))
    ratios = [simulated_speedup(run) for run in (pools[BASE].runs if BASE in pools else ())]
    if simulated := [ratio for ratio in ratios if ratio is not None]:
        return Mean(fmean(simulated), 0, None, pools[BASE].logs)
    if THEORY not in pools:
        return Mean(None, 0, None, (), gap="no theory")
    found = [value for run in pools[THEORY].runs for value in selection.series(run, SPEEDUP)]
    logs = pools[THEORY].logs
    return Mean(found[-1], 0, None, logs) if found else Mean(None, 0, None, logs, gap="no values")


def simulated_speedup(run: Run) -> float | None:
    """Training apart over training in one stream, optimizer steps included, both simulated with costs that
    the run measured; None where its log has none."""
    for found in run.simulations:
        seconds = found["seconds"]
        if found["stage"] == "training" and seconds.get("apart") and seconds.get("fused"):
            return seconds["apart"] / seconds["fused"]
    return None


def equal_cost_speedup(run: Run) -> float | None:
    """2(M+P-1) / (2M+P-1) where actor and critic are alike and the log tells the micro-batches; else None."""
    training, batch, micro = (
        run.layouts.get("training"),
        run.config.get("global_batch_size"),
        run.config.get("micro_batch_size"),
    )
    if run.actor != run.critic or not isinstance(training, Mapping) or not batch or not micro:
        return None
    stages, count = training["pp"], batch // (micro * training["dp"])
    return 2 * (count + stages - 1) / (2 * count + stages - 1)


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    known = [
        "Mean time of the training stage without time-sharing (ts) over that with it, iteration 0 left out. "
        "Whiskers: the largest distance of an iteration's ratio from the last iteration's (of repeated runs, "
        "one standard deviation over repeats). Under the bars: (PP,DP,TP), global batch, and n, the "
        "iterations averaged with ts."
    ]
    published = irregularities.has_published(rows)
    mended = any(note.startswith(CORRECTED) for row in rows for note in row.notes)
    if published and not mended:
        known.append(
            "The published theoretical values are constants; how they were derived was not published."
        )
    if published and mended:
        known.append(
            "Theoretical values without a mark are the published constants, whose derivation was not "
            "published: the formula is for two models of equal cost. Published bars above a corrected value "
            "leave out the critic's optimizer step."
        )
    if any(row.series == "Theoretical" and row.provenance in ("measured", "rehearsal") for row in rows):
        known.append(
            "Theoretical: training without ts over training with it, both simulated with the optimizer steps "
            "in, by costs that the run without ts measured."
        )
    return [*known, *irregularities.unstepped_critic(rows)]


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """The bars, a panel per cluster and pair; batches side by side."""
    return bars.ratio_bars(drawn(rows, RATIO), LOOKS, notes, 1.05, _tick, _title)


def _title(row: Row) -> str:
    return f"{row.cluster}, {row.config.split(' bs')[0]}"


def _tick(config: str) -> str:
    batch, pp, dp, tp = _figures(config)
    return f"{pp},{dp},{tp}\nbs {batch}"
