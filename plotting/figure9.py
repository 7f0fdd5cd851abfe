"""Figure 9: training-stage speed-up of actor and critic sharing one pipeline (time-sharing, `bulk`)."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from plotting import bars, irregularities, selection, stats
from plotting.irregularities import CORRECTED
from plotting.rows import RATIO, Row, drawn
from plotting.style import BASELINE, OURS, Look
from puzzle.runlog.run import Run

NAME = "figure9"
BASE = "wo_bulk"
SYSTEMS = {BASE: "PUZZLE w/o ts", "w_bulk": "PUZZLE w/ ts"}
LOOKS = {"PUZZLE w/o ts": Look(BASELINE), "PUZZLE w/ ts": Look(OURS)}


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """mean training(without) / mean training(with) per cluster and pair, and the seconds behind."""
    grid = selection.grid(runs, NAME, SYSTEMS)
    grid = irregularities.other_jobs(grid, runs, BASE, "training", reading == CORRECTED)
    return stats.speedups(grid, SYSTEMS, BASE, stats.of("training"))


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    return [
        "Mean time of the training stage without time-sharing (ts) over that of the variant, iteration 0 "
        f"left out. {stats.whiskers(rows)}",
        *irregularities.unstepped_critic(rows),
    ]


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """The bars, a panel per cluster."""
    return bars.ratio_bars(drawn(rows, RATIO), LOOKS, notes, height=1.0)
