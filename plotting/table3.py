"""Table 3: seconds of one context switch: PUZZLE's re-sharding, DeepSpeed-Chat's gather."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puzzle.plotting import irregularities, page, selection, stats
from puzzle.plotting.irregularities import CORRECTED
from puzzle.plotting.rows import Row, by_cluster, ordered, span
from puzzle.plotting.style import COLUMN, GREY, INK, SMALL, TEXT, TINY, TITLE_SIZE, fitting, width_of
from puzzle.runlog.run import Run

NAME = "table3"
TITLE = "seconds of one context switch"
BASE = "dschat"
SYSTEMS = {"opt": "PUZZLE", BASE: "DS-Chat"}
QUANTITIES = {"opt": "reshard", BASE: "gather"}
LEAST = 0.001
ACROSS = 2
"""Clusters side by side."""
NAMES, HEAD, LINE_HEIGHT = 0.62, 0.36, 0.3
"""Inches: width of the first column, height of the head, height of a line."""


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """Mean seconds of a switch per cluster, pair and system."""
    mend = reading == CORRECTED
    grid = selection.grid(runs, NAME, SYSTEMS, order=_by_actor)
    grid = irregularities.other_names(grid, BASE)
    grid = irregularities.other_jobs(grid, runs, BASE, "reshard", mend)
    grid = irregularities.altered_copies(grid, runs, mend)
    names = selection.titles(grid)
    return [
        stats.row_of(
            stats.mean(pool, stats.of(QUANTITIES[variant])),
            names[panel],
            config,
            SYSTEMS[variant],
            panel.provenance,
        )
        for panel, config, variant, pool in selection.cells(grid, SYSTEMS)
    ]


def headline(rows: Sequence[Row]) -> str:
    """Each system's seconds, per cluster."""

    def spans(mine: list[Row]) -> str:
        named = ordered(row.series for row in mine)
        return ", ".join(f"{name} {span(row for row in mine if row.series == name)}" for name in named)

    return by_cluster(rows, spans, "; ")


def _by_actor(config: str) -> tuple[float, ...]:
    """By the actor's size, whose weights the switch moves, then the critic's."""
    return selection.pair_order(config)[::-1]


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all cells."""
    return [
        "Mean seconds of one switch, iteration 0 left out; below, one standard deviation "
        f"{stats.over(rows)} and the number of values."
    ]


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """A table: pairs down, clusters and systems across, two clusters side by side."""
    clusters = ordered(row.cluster for row in rows)
    kinds = {row.cluster: page.real(row) for row in rows}
    groups = [
        alike[index : index + ACROSS]
        for alike in ([one for one in clusters if kinds[one] is kind] for kind in (True, False))
        for index in range(0, len(alike), ACROSS)
    ]
    parts = []
    for group in groups:
        mine = [row for row in rows if row.cluster in group]
        height = HEAD + LINE_HEIGHT * len(ordered(row.config for row in mine))
        parts.append(page.Part("", mine, height, 0.05))
    letters = page.marks(rows)
    figure, axes = page.layout(parts, rows, notes, key=0.0, left=page.RIGHT)
    for one, part in zip(axes, parts, strict=True):
        _table(one, part, letters)
    return figure


def _table(axes: Axes, part: page.Part, letters: Mapping[str, str]) -> None:
    """Draws in inches from the top left corner."""
    width = COLUMN - 2 * page.RIGHT
    shown = ordered(row.cluster for row in part.rows)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(part.height, 0)
    configs = ordered(row.config for row in part.rows)
    column = (width - NAMES) / (ACROSS * len(SYSTEMS))
    for index, cluster in enumerate(shown):
        left = NAMES + index * column * len(SYSTEMS)
        size = fitting(cluster, 2 * column - 0.1, TITLE_SIZE)
        axes.text(left + column, 0.1, cluster, size=size, ha="center", va="center")
        axes.plot([left + 0.08, left + column * len(SYSTEMS) - 0.08], [0.2, 0.2], color=INK, lw=0.4)
        for place, system in enumerate(SYSTEMS.values()):
            middle = left + (place + 0.5) * column
            axes.text(middle, 0.28, system, ha="center", va="center")
            for row in part.rows:
                if (row.cluster, row.series) == (cluster, system):
                    _cell(axes, middle, HEAD + LINE_HEIGHT * configs.index(row.config), row, letters)
    for line, config in enumerate(configs):
        name = config if width_of(config, TEXT) < NAMES - 0.04 else config.replace("/", "/\n")
        size = min(fitting(part, NAMES - 0.04, TEXT) for part in name.split("\n"))
        axes.text(0.02, HEAD + LINE_HEIGHT * (line + 0.5), name, size=size, va="center", linespacing=1.1)
    for at, weight in ((0.0, 0.9), (HEAD, 0.5), (part.height, 0.9)):
        axes.plot(
            [0, NAMES + len(shown) * column * len(SYSTEMS)], [at, at], color=INK, lw=weight, clip_on=False
        )


def _cell(axes: Axes, middle: float, top: float, row: Row, letters: Mapping[str, str]) -> None:
    if row.value is None:
        text = page.marked(row, row.gap, letters)
        axes.text(middle, top + 0.14, text, size=SMALL, color=GREY, ha="center", va="center")
        return
    text = page.marked(row, page.seconds(row.value), letters)
    axes.text(middle, top + 0.11, text, ha="center", va="center")
    spread = "" if row.spread is None else f"\u00b1{max(row.spread, LEAST):.3f}, "
    if row.spread is not None and row.spread < LEAST:
        spread = spread.replace("\u00b1", "\u00b1<")
    axes.text(middle, top + 0.22, f"{spread}n={row.n}", size=TINY, color=GREY, ha="center", va="center")
