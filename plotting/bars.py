"""Speed-ups as grouped bars."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from puzzle.plotting.page import (
    LEFT,
    RIGHT,
    Part,
    by_cluster,
    counts,
    layout,
    legend,
    marked,
    marks,
    parts_of,
    same_scale,
    split,
)
from puzzle.plotting.rows import Row, ordered
from puzzle.plotting.style import COLUMN, FAINT, GREY, INK, LINE, SMALL, TINY, Look, width_of

AXES = COLUMN - LEFT - RIGHT
GROUP = 0.82
"""Share of a configuration's width that its bars take."""
PAD, WIDEST, MOST = 0.025, 0.34, 8
"""Inches between a bar and its value; inches of the widest bar; configurations in one panel."""


def two_lines(config: str) -> str:
    """A pair of long names as a tick label."""
    return config.replace("/", "/\n") if width_of(config, SMALL) > AXES / 5 else config


def ratio_bars(
    rows: Sequence[Row],
    looks: Mapping[str, Look],
    notes: Sequence[str],
    height: float,
    tick: Callable[[str], str] = two_lines,
    title: Callable[[Row], str] = by_cluster,
) -> Figure:
    """A page of panels of `height` inches, one per `title`; `tick` names a configuration below its bars."""
    parts = [
        replace(piece, ticks=max(len(lines) for lines in labels) * SMALL * LINE * 1.1 + 0.1)
        for part in parts_of(rows, title, height, ticks=0)
        for labels in [_labels(part, tick)]
        for piece in split(part, _most(labels))
    ]
    letters = marks(rows)
    figure, axes = layout(parts, rows, notes, key=0.2)
    legend(figure, looks, len(looks))
    for one, part in zip(axes, parts, strict=True):
        turned, top = _fitted(same_scale(parts, part), looks, letters)
        one.set_ylim(0, top)
        _grouped(one, part, looks, letters, turned)
        one.axhline(1, color=GREY, lw=0.4, dashes=(4, 3), zorder=0)
        one.set_axisbelow(True)
        one.yaxis.grid(color=FAINT, linewidth=0.4)
        one.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        one.set_ylabel("Speed-up", labelpad=2)
        one.tick_params(axis="x", length=0)
        names = ["\n".join(lines) for lines in _labels(part, tick)]
        one.set_xticks(range(len(names)), names, linespacing=1.25)
    return figure


def _labels(part: Part, tick: Callable[[str], str]) -> list[list[str]]:
    """The lines under each configuration's bars: its name and n."""
    found = []
    for config in _configs(part.rows):
        count = counts([row for row in part.rows if row.config == config])
        found.append([*tick(config).split("\n"), *([count] if count else [])])
    return found


def _most(labels: Sequence[Sequence[str]]) -> int:
    """How many configurations with such labels fit side by side."""
    widest = max(width_of(line, SMALL) for lines in labels for line in lines)
    return max(1, min(MOST, int(AXES / (widest + 0.02))))


def _configs(rows: Sequence[Row]) -> list[str]:
    return ordered(row.config for row in rows)


def _grouped(
    axes: Axes, part: Part, looks: Mapping[str, Look], letters: Mapping[str, str], turned: bool
) -> None:
    """Draws a part's rows as bars grouped by configuration, their values above, upright where `turned`."""
    configs = _configs(part.rows)
    axes.set_xlim(-0.5, len(configs) - 0.5)
    width = _width(configs, looks)
    lift = PAD / part.height * axes.get_ylim()[1]
    for row in part.rows:
        place = configs.index(row.config) + (list(looks).index(row.series) - (len(looks) - 1) / 2) * width
        if row.value is None:
            axes.text(place, lift, row.gap, size=TINY, color=GREY, rotation=90, ha="center", va="bottom")
            axes.plot([place - width * 0.4, place + width * 0.4], [0, 0], color=GREY, lw=1.6, clip_on=False)
            continue
        look, reach = looks[row.series], row.value + (row.spread or 0)
        axes.bar(place, row.value, width * 0.92, color=look.colour, hatch=look.hatch, edgecolor=INK, lw=0.3)
        if row.spread:
            axes.errorbar(place, row.value, row.spread, ecolor=INK, elinewidth=0.5, capsize=1.1, capthick=0.5)
        text, turn = _value(row, letters), 90 if turned else 0
        axes.text(place, reach + lift, text, size=TINY, ha="center", va="bottom", rotation=turn)


def _width(configs: Sequence[str], looks: Mapping[str, Look]) -> float:
    """A bar's width, where a configuration's place is 1 wide."""
    return min(GROUP / len(looks), WIDEST * len(configs) / AXES)


def _value(row: Row, letters: Mapping[str, str]) -> str:
    return marked(row, f"{row.value:.2f}", letters)


def _fitted(
    parts: Sequence[Part], looks: Mapping[str, Look], letters: Mapping[str, str]
) -> tuple[bool, float]:
    """Whether values must stand upright to fit over their bars, and the axis limit that leaves them room."""
    shown = [(part, row) for part in parts for row in part.rows if row.value is not None]
    turned = False
    for part, row in shown:
        configs = _configs(part.rows)
        room = AXES / len(configs) * _width(configs, looks)
        turned = turned or width_of(_value(row, letters), TINY) > room
    top = 1.0
    for part, row in shown:
        needs = width_of(_value(row, letters), TINY) if turned else TINY * LINE
        top = max(top, ((row.value or 0) + (row.spread or 0)) / (1 - (needs + 2 * PAD) / part.height))
    return turned, top * 1.01
