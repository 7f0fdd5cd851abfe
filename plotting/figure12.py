"""Figure 12: seconds per stage of one iteration, stacked, for the pair that the logs hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puzzle.plotting import irregularities, page, selection, stats
from puzzle.plotting.irregularities import CORRECTED
from puzzle.plotting.rows import Row, by_cluster, ordered
from puzzle.plotting.selection import Pool
from puzzle.plotting.stats import Mean, Values, mean, minus, of
from puzzle.plotting.style import COLUMN, FAINT, GREY, INK, STAGES, TINY, width_of
from puzzle.runlog.run import Run

NAME = "figure12"
TITLE = "seconds of an iteration's stages together"
BASE = "dschat"
SYSTEMS = {BASE: "DSChat", "base": "PUZZLE-Base", "opt": "PUZZLE"}
LABELS = ("Stage1 (Gen.)", "Stage2 (Infer.)", "Stage3 (Train.)", "Comm.")
LOOKS = dict(zip(LABELS, STAGES, strict=True))
SHORT = dict(zip(LABELS, ("gen.", "infer.", "train.", "comm."), strict=True))
LEFT, LANE, THICK = 0.68, 0.31, 0.62
"""Inches left of the axes and per bar; a bar's share of its lane."""
WIDTH = COLUMN - LEFT - page.RIGHT

STAGE_VALUES: Mapping[str, tuple[Values | None, ...]] = {
    BASE: (of("generation"), minus("experience", "generation"), of("training"), of("gather")),
    "base": (of("generation"), of("inference"), of("training"), None),
    "opt": (minus("generation", "reshard"), of("inference"), of("training"), of("reshard")),
}
"""Per system the seconds of the four stages; None is zero by definition."""
ONE_LAYOUT: Mapping[str, str] = {"opt": "base"}
"""Whose stages a system has that generates in the layout it trains in: nothing is re-sharded."""


def numbers(runs: Sequence[Run], reading: str) -> list[Row]:
    """Mean seconds per stage, system and cluster; the configuration is the system."""
    grid = selection.grid(runs, NAME, SYSTEMS)
    grid = irregularities.slower_baselines(grid, runs, BASE, mend=False)
    grid = irregularities.other_jobs(grid, runs, BASE, "generation", reading == CORRECTED)
    names = selection.titles(grid)
    rows = []
    for panel, config, variant, pool in selection.cells(grid, SYSTEMS):
        system = SYSTEMS[variant] if len(grid[panel]) == 1 else f"{config} {SYSTEMS[variant]}"
        for label, own in zip(LABELS, _stages(variant, pool, reading), strict=True):
            rows.append(stats.row_of(own, names[panel], system, label, panel.provenance))
    return rows


def _stages(variant: str, pool: Pool | None, reading: str) -> Iterator[Mean]:
    if pool is not None and all(irregularities.reshards(run) is False for run in pool.runs):
        variant = ONE_LAYOUT.get(variant, variant)
    for index, values in enumerate(STAGE_VALUES[variant]):
        if values is None:
            known = mean(pool, of("generation"))
            yield known if known.value is None else Mean(0.0, 0, None, known.logs)
        elif reading == CORRECTED and variant == BASE and pool is not None:
            yield _mended(index, pool, values)
        else:
            yield mean(pool, values)


def _mended(index: int, pool: Pool, values: Values) -> Mean:
    """DeepSpeed-Chat's stages with the gather counted once and one training time per iteration."""
    label = LABELS[index]
    if label == LABELS[0] and all(selection.series(run, "gather") for run in pool.runs):
        note = "corrected: the gather is taken out of the generation, where it was counted a second time"
        return mean(pool.noted(note), minus("generation", "gather"))
    if label == LABELS[2] and all(run.provenance == irregularities.PUBLISHED for run in pool.runs):
        note = (
            "corrected: one training time per iteration, the slowest rank's; as published every rank's line "
            "counts, glued lines as 0.0, and all but one of the warm-up's"
        )
        return mean(pool.noted(note), irregularities.training_per_iteration)
    return mean(pool, values)


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be known about all bars."""
    known = [
        "Mean seconds of each stage, iteration 0 left out; behind a bar the sum, in brackets what is too "
        f"short to be written inside. Whiskers: one standard deviation {stats.over(rows)}. n: values "
        "averaged per stage. PUZZLE's communication is its re-sharding, taken out of the generation; "
        "PUZZLE-Base has none by definition."
    ]
    corrected = any("corrected" in note for row in rows for note in row.notes)
    chat = [row for row in rows if row.config.endswith(SYSTEMS[BASE]) and row.value]
    if not corrected and any(row.series == LABELS[3] for row in chat):
        twice = "DS-Chat's gather is part of its generation time and shown a second time as communication."
        lines = " Its training times are the lines of several ranks."
        known.append(twice + lines * irregularities.has_published(chat))
    return known


def headline(rows: Sequence[Row]) -> str:
    """The seconds behind each bar, the systems in the order of the bars, per cluster."""

    def sums(mine: list[Row]) -> str:
        found = {
            bar: [row.value or 0.0 for row in mine if row.config == bar]
            for bar in ordered(row.config for row in mine)
        }
        return ", ".join(f"{bar} {sum(stages):.1f}" for bar, stages in found.items())

    return by_cluster(rows, sums, "; ")


@dataclass(frozen=True)
class _Segment:
    """One stage of one bar: where it starts, what is written on it (nothing without room), upright or not."""

    row: Row
    left: float
    text: str
    turn: int


def draw(rows: Sequence[Row], notes: Sequence[str]) -> Figure:
    """One panel per cluster, one bar per system."""
    parts = page.parts_of(rows, _title, height=0.0, ticks=0.14)
    parts = [replace(part, height=LANE * len(_bars(part.rows))) for part in parts]
    parts[-1] = replace(parts[-1], ticks=0.32)
    letters = page.marks(rows)
    figure, axes = page.layout(parts, rows, notes, key=0.32, left=LEFT)
    page.legend(figure, LOOKS, 2)
    for one, part in zip(axes, parts, strict=True):
        alike = page.same_scale(parts, part)
        one.set_xlim(0, _limit([stages for other in alike for stages in _bars(other.rows)], letters))
        _panel(one, _bars(part.rows), letters)
        one.xaxis.grid(color=FAINT, linewidth=0.4)
        one.set_axisbelow(True)
    axes[-1].set_xlabel("Execution time (s)", labelpad=2)
    return figure


def _title(row: Row) -> str:
    """The cluster, and the pair where several are drawn."""
    return ", ".join(filter(None, (row.cluster, row.config.rpartition(" ")[0])))


def _bars(rows: Sequence[Row]) -> list[list[Row]]:
    """The stages of each system."""
    return [[row for row in rows if row.config == config] for config in ordered(row.config for row in rows)]


def _limit(systems: Sequence[Sequence[Row]], letters: Mapping[str, str]) -> float:
    """Seconds at the right end of the axis, so that the longest bar and the text behind it fit."""
    limit = max(_reach(stages) for stages in systems) or 1.0
    for _ in range(4):  # the text depends on what fits into the bars, and that on the limit
        lengths = [width_of(_behind(stages, limit, letters), TINY) + 0.08 for stages in systems]
        ends = zip(systems, lengths, strict=True)
        limit = max(_reach(stages) * WIDTH / (WIDTH - length) for stages, length in ends)
    return limit or 1.0


def _reach(stages: Sequence[Row]) -> float:
    """Seconds at the end of the bar or of its last whisker."""
    ends = accumulate(row.value or 0.0 for row in stages)
    return max(end + (row.spread or 0.0) for end, row in zip(ends, stages, strict=True))


def _common(stages: Sequence[Row]) -> list[str]:
    return [note for note in stages[0].notes if all(note in row.notes for row in stages)]


def _segments(stages: Sequence[Row], limit: float, letters: Mapping[str, str]) -> list[_Segment]:
    left, found, common = 0.0, [], _common(stages)
    for row in stages:
        if row.value is None:
            continue
        own = replace(row, notes=tuple(note for note in row.notes if note not in common))
        text = page.marked(own, page.seconds(row.value), letters)
        length, room = width_of(text, TINY) + 0.04, row.value / limit * WIDTH
        turn = 0 if length < room else 90
        fits = turn == 0 or (room > 1.3 * TINY / 72 and length < THICK * LANE + 0.03)
        found.append(_Segment(row, left, text if fits else "", turn))
        left += row.value
    return found


def _behind(stages: Sequence[Row], limit: float, letters: Mapping[str, str]) -> str:
    """What is written behind a bar: the sum, and what is missing or too short to be written inside."""
    missing = [row for row in stages if row.value is None]
    if len(missing) == len(stages):
        return missing[0].gap
    segments = _segments(stages, limit, letters)
    short = [one.row for one in segments if one.row.value and not one.text]
    rest = [f"{SHORT[row.series]} {page.seconds(row.value or 0)}" for row in short]
    rest += [f"{SHORT[row.series]} {row.gap}" for row in missing]
    return page.seconds(sum(row.value or 0 for row in stages)) + (f" ({', '.join(rest)})" if rest else "")


def _panel(axes: Axes, systems: Sequence[Sequence[Row]], letters: Mapping[str, str]) -> None:
    axes.set_ylim(len(systems) - 0.5, -0.5)
    names = []
    for place, stages in enumerate(systems):
        label = replace(stages[0], notes=tuple(_common(stages)))
        system = label.config.rpartition(" ")[2].replace("DSChat", "DS-Chat")
        name = page.marked(label, system, letters)
        names.append(f"{name}\n{page.counts(stages)}".strip())
        _bar(axes, place, stages, letters)
    axes.set_yticks(range(len(systems)), names, linespacing=1.1)
    axes.tick_params(axis="y", length=0)


def _bar(axes: Axes, place: int, stages: Sequence[Row], letters: Mapping[str, str]) -> None:
    limit = axes.get_xlim()[1]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    centred: dict[str, Any] = {"size": TINY, "ha": "center", "va": "center", "zorder": 6}
    for one in _segments(stages, limit, letters):
        value, look = one.row.value or 0.0, LOOKS[one.row.series]
        axes.barh(place, value, THICK, one.left, color=look.colour, hatch=look.hatch, edgecolor=INK, lw=0.3)
        if one.row.spread:
            end = one.left + value
            axes.errorbar(
                end, place, xerr=one.row.spread, ecolor=INK, elinewidth=0.5, capsize=1.3, capthick=0.5
            )
        if one.text:
            ground = {"color": look.ink, "bbox": box if look.hatch else None}
            axes.text(one.left + value / 2, place, one.text, rotation=one.turn, **centred, **ground)
    colour = GREY if any(row.value is None for row in stages) else INK
    start = _reach(stages) + 0.04 * limit / WIDTH
    axes.text(start, place, _behind(stages, limit, letters), size=TINY, color=colour, ha="left", va="center")
