"""What one change does: end-to-end time of runs that differ from a baseline in exactly one factor."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from puzzle.plotting import bars, selection, stats
from puzzle.plotting.rows import RATIO, Row, by_cluster, drawn, span
from puzzle.plotting.selection import Grid
from puzzle.plotting.style import BASELINE, OURS, Look
from puzzle.runlog.run import Run

NAME = "ablation"
TITLE = "end to end, times as fast as the baseline, by one change"
BASE, CHANGED = "baseline", "with one change"
BASE_VARIANT = "base"
"""Whose runs are the baselines: the training layout for all, small decode micro-batches, nothing shared."""
LOOKS = {BASE: Look(BASELINE), CHANGED: Look(OURS)}
FACTORS = {
    "generation.layout": "generation layout",
    "intra.fuse_training": "fused training",
    "intra.fuse_inference": "fused inference",
    "intra.split_backward": "split backward",
    "generation.decode_microbatch": "decode micro-batch",
    "generation.graphs": "CUDA graphs",
    "algorithm.packing": "packing",
    "generation.early_stop": "early stop",
}
"""Keys of a run's configuration, and what they are called."""
FREE = ("log", "seed", "iterations", "checkpoint")
"""Sections that say nothing about how fast an iteration is."""


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """mean e2e(baseline) / mean e2e(changed) per cluster, pair and factor, and the seconds behind."""
    named = {run.variant for run in runs if NAME in run.figures}
    grid: Grid = {}
    for panel, pairs in selection.grid(runs, NAME, named).items():
        found = {
            f"{pair} {said}": {BASE: pools[BASE_VARIANT], CHANGED: pool}
            for pair, pools in pairs.items()
            if BASE_VARIANT in pools
            for variant, pool in pools.items()
            if variant != BASE_VARIANT and (said := change(pools[BASE_VARIANT].runs[0], pool.runs[0]))
        }
        if found:
            grid[panel] = found
    return stats.speedups(grid, {BASE: BASE, CHANGED: CHANGED}, BASE, stats.of("e2e"))


def change(base: Run, run: Run) -> str | None:
    """`FACTOR: OLD to NEW` where a run differs from its baseline in one factor and in nothing else that its
    log tells; else None."""
    old, new = dict(_flat(base.config)), dict(_flat(run.config))
    different = {_key(name) for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    different -= set(FREE)
    if len(different) != 1 or not different <= FACTORS.keys():
        return None
    (key,) = different
    return f"{FACTORS[key]}: {_said(base.config, key)} to {_said(run.config, key)}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in config.items():
        inside = isinstance(value, Mapping)
        flat += _flat(value, f"{prefix}{name}.") if inside else [(f"{prefix}{name}", value)]
    return flat


def _key(name: str) -> str:
    """The factor or section free to differ that a dotted key belongs to, else the key."""
    return next((key for key in (*FACTORS, *FREE) if name == key or name.startswith(f"{key}.")), name)


def _said(config: Mapping[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return ",".join(str(value.get(axis)) for axis in ("tp", "pp", "dp"))
    return {True: "on", False: "off", None: "default"}.get(value, str(value))


def headline(rows: Sequence[Row]) -> str:
    """What the changes gain, per cluster."""
    return by_cluster([row for row in drawn(rows, RATIO) if row.series == CHANGED], span)


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    return [
        "Mean end-to-end time of the baseline over that of a run that differs from it in one thing, "
        f"iteration 0 left out. Layouts are tp,pp,dp. {stats.whiskers(rows)}"
    ]


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """The bars, a panel per cluster; changes side by side."""
    return bars.ratio_bars(drawn(rows, RATIO), LOOKS, notes, 1.0, _tick)


def _tick(config: str) -> str:
    pair, _, said = config.partition(" ")
    factor, _, values = said.partition(": ")
    return f"{pair}\n{factor}\n{values}"
