"""Figure 11: end-to-end speed-up over the layout that is best for training."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from plotting import bars, irregularities, selection, stats
from plotting.irregularities import CORRECTED
from plotting.rows import RATIO, Row, drawn
from plotting.style import BASELINE, OTHER, OURS, Look
from puzzle.runlog.run import Run

NAME = "figure11"
BASE = "train_opt"
SYSTEMS = {BASE: "train-opt", "gen_opt": "gen-opt", "opt": "PUZZLE"}
LOOKS = {"train-opt": Look(BASELINE), "gen-opt": Look(OTHER, "////"), "PUZZLE": Look(OURS)}


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """mean e2e(train_opt) / mean e2e(variant) per cluster and pair, and the seconds behind."""
    mend = reading == CORRECTED
    grid = selection.grid(runs, NAME, SYSTEMS)
    grid = irregularities.without_reshard(grid, runs, mend)
    grid = irregularities.other_jobs(grid, runs, BASE, "e2e", mend)
    return stats.speedups(grid, SYSTEMS, BASE, stats.of("e2e"))


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    known = [
        "Mean end-to-end time of train-opt over that of the variant, iteration 0 left out. "
        + stats.whiskers(rows)
    ]
    if irregularities.has_published(rows):
        known.append(
            "Published PUZZLE runs also train actor and critic in one pipeline and decode in other "
            "micro-batches than train-opt, so their bars are not the effect of the generation layout alone."
        )
    return known


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """The bars, a panel per cluster."""
    return bars.ratio_bars(drawn(rows, RATIO), LOOKS, notes, height=1.1)
