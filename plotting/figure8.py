"""Figure 8: end-to-end speed-up over DeepSpeed-Chat."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from plotting import bars, irregularities, selection, stats
from plotting.irregularities import CORRECTED
from plotting.rows import RATIO, Row, drawn
from plotting.style import BASELINE, MIDDLE, OURS, Look
from puzzle.runlog.run import Run

NAME = "figure8"
BASE = "dschat"
SYSTEMS = {BASE: "DS-Chat", "base": "PUZZLE-Base", "opt": "PUZZLE"}
LOOKS = {"DS-Chat": Look(BASELINE), "PUZZLE-Base": Look(MIDDLE, "////"), "PUZZLE": Look(OURS)}


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """mean e2e(DS-Chat) / mean e2e(system) per cluster and pair, and the seconds behind."""
    mend = reading == CORRECTED
    grid = selection.grid(runs, NAME, SYSTEMS)
    grid = irregularities.without_reshard(grid, runs, mend)
    grid = irregularities.slower_baselines(grid, runs, BASE, mend)
    grid = irregularities.other_jobs(grid, runs, BASE, "e2e", mend)
    return stats.speedups(grid, SYSTEMS, BASE, stats.of("e2e"))


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    return [
        "Mean end-to-end time of DS-Chat over that of the system, iteration 0 left out. "
        + stats.whiskers(rows)
    ]


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """The bars, a panel per cluster."""
    return bars.ratio_bars(drawn(rows, RATIO), LOOKS, notes, height=1.1)
