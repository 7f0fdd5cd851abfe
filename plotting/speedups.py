"""Figures 8, 9 and 11: mean time of a baseline over that of each system, per cluster and pair of models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from puzzle.plotting import bars, irregularities, selection, stats
from puzzle.plotting.irregularities import CORRECTED
from puzzle.plotting.rows import RATIO, Row, by_cluster, drawn, span
from puzzle.plotting.style import BASELINE, MIDDLE, OTHER, OURS, Look
from puzzle.runlog.run import Run


@dataclass(frozen=True)
class SpeedUps:
    """One such figure. `TITLE` says what its bars are; `systems` names variants, the baseline first;
    `quantity` is what is compared.

    `switches` says that a system changes layouts, `rivals` that baselines were run several times.
    """

    NAME: str
    TITLE: str
    systems: Mapping[str, str]
    looks: Sequence[Look]
    quantity: str
    note: str
    remarks: Callable[[Sequence[Row]], list[str]]
    height: float = 1.1
    switches: bool = True
    rivals: bool = False

    def numbers(self, runs: Sequence[Run], reading: str) -> list[Row]:
        """mean(baseline) / mean(system) per cluster and pair, and the seconds behind."""
        mend, base = reading == CORRECTED, next(iter(self.systems))
        grid = selection.grid(runs, self.NAME, self.systems)
        if self.switches:
            grid = irregularities.without_reshard(grid, runs, mend)
        if self.rivals:
            grid = irregularities.slower_baselines(grid, runs, base, mend)
        grid = irregularities.other_jobs(grid, runs, base, self.quantity, mend)
        return stats.speedups(grid, self.systems, base, stats.of(self.quantity))

    def headline(self, rows: Sequence[Row]) -> str:
        """What the last system gains, per cluster."""
        ours = list(self.systems.values())[-1]
        return by_cluster([row for row in drawn(rows, RATIO) if row.series == ours], span)

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """What is to be known about all bars."""
        return [f"{self.note}, iteration 0 left out. {stats.whiskers(rows)}", *self.remarks(rows)]

    def draw(self, rows: Sequence[Row], notes: Sequence[str]) -> Figure:
        """The bars, a panel per cluster."""
        looks = dict(zip(self.systems.values(), self.looks, strict=True))
        return bars.ratio_bars(drawn(rows, RATIO), looks, notes, self.height)


def _published_layouts(rows: Sequence[Row]) -> list[str]:
    if not irregularities.has_published(rows):
        return []
    return [
        "Published PUZZLE runs also train actor and critic in one pipeline and decode in other "
        "micro-batches than train-opt, so their bars are not the effect of the generation layout alone."
    ]


figure8 = SpeedUps(
    "figure8",
    "end to end, times as fast as DS-Chat",
    {"dschat": "DS-Chat", "base": "PUZZLE-Base", "opt": "PUZZLE"},
    (Look(BASELINE), Look(MIDDLE, "////"), Look(OURS)),
    "e2e",
    "Mean end-to-end time of DS-Chat over that of the system",
    lambda rows: [],
    rivals=True,
)
figure9 = SpeedUps(
    "figure9",
    "training, times as fast as without time-sharing",
    {"wo_bulk": "PUZZLE w/o ts", "w_bulk": "PUZZLE w/ ts"},
    (Look(BASELINE), Look(OURS)),
    "training",
    "Mean time of the training stage without time-sharing (ts) over that of the variant",
    irregularities.unstepped_critic,
    height=1.0,
    switches=False,
)
figure11 = SpeedUps(
    "figure11",
    "end to end, times as fast as train-opt",
    {"train_opt": "train-opt", "gen_opt": "gen-opt", "opt": "PUZZLE"},
    (Look(BASELINE), Look(OTHER, "////"), Look(OURS)),
    "e2e",
    "Mean end-to-end time of train-opt over that of the variant",
    _published_layouts,
)
