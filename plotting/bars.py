"""Pages of panels: grouped bars, footnotes, watermarks; shared by the figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from plotting.rows import Row, ordered
from plotting.selection import REAL
from plotting.style import COLUMN, FAINT, GREY, INK, LINE, SMALL, TEXT, TINY, Look, page, width_of, wrapped

LEFT, RIGHT, EDGE = 0.42, 0.06, 0.06
"""Inches: left of the axes, right of them, around everything."""
AXES = COLUMN - LEFT - RIGHT
TITLE = 0.17
GROUP = 0.82
"""Share of a configuration's width that its bars take."""
PAD, WIDEST = 0.025, 0.34
"""Inches: between a bar and its value; the widest bar."""


@dataclass(frozen=True)
class Part:
    """One panel: its title, its rows, and inches of axes and of tick labels below them."""

    title: str
    rows: Sequence[Row]
    height: float
    ticks: float


def marks(rows: Sequence[Row]) -> dict[str, str]:
    """A letter for every distinct footnote of `rows`, in order of appearance."""
    notes = ordered(note for row in rows for note in row.notes)
    return {note: _letter(index) for index, note in enumerate(notes)}


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def marked(row: Row, text: str, letters: Mapping[str, str]) -> str:
    """`text` with the letters of the row's footnotes."""
    return f"{text} {','.join(letters[note] for note in row.notes)}" if row.notes else text


def layout(
    parts: Sequence[Part], rows: Sequence[Row], notes: Sequence[str], key: float, left: float = LEFT
) -> tuple[Figure, list[Axes]]:
    """A page with one axes per part, `left` inches in, under `key` inches of legend; footnotes below."""
    lines = [line for note in notes for line in wrapped(note, COLUMN - 2 * EDGE, TINY)]
    for note, letter in marks(rows).items():
        first, *rest = wrapped(note, COLUMN - 2 * EDGE - 0.1, TINY)
        lines += [f"{letter}\t{first}", *(f"\t{line}" for line in rest)]
    foot = len(lines) * TINY * LINE + 2 * EDGE
    figure = page([TITLE + part.height + part.ticks for part in parts], key + EDGE, foot)
    height = figure.get_figheight()
    axes, at = [], height - key - EDGE
    for part in parts:
        at -= TITLE + part.height
        one = figure.add_axes(
            (left / COLUMN, at / height, (COLUMN - left - RIGHT) / COLUMN, part.height / height)
        )
        figure.text(left / COLUMN, (at + part.height + 0.035) / height, part.title, size=TEXT, weight="bold")
        _dress(one, part)
        axes.append(one)
        at -= part.ticks
    for index, line in enumerate(lines):
        letter, tab, text = line.rpartition("\t")
        y = (foot - EDGE - (index + 1) * TINY * LINE + 0.01) / height
        figure.text(EDGE / COLUMN, y, letter, size=TINY, color=INK, style="italic")
        figure.text((EDGE + (0.1 if tab else 0)) / COLUMN, y, text, size=TINY, color=GREY)
    return figure, axes


def _dress(axes: Axes, part: Part) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=2, width=0.5, pad=1.5, labelsize=SMALL)
    made = ordered(
        row.provenance for row in part.rows if row.provenance not in REAL and row.value is not None
    )
    if made:
        axes.text(
            0.5, 0.5, " + ".join(made), transform=axes.transAxes, size=20, color=GREY, alpha=0.28,
            ha="center", va="center", rotation=12, zorder=5,
        )  # fmt: skip


def legend(figure: Figure, looks: Mapping[str, Look], columns: int) -> None:
    """The key of the series, at the head of the page."""
    handles = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor=INK, linewidth=0.4, label=name)
        for name, look in looks.items()
    ]
    figure.legend(
        handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=TEXT, borderpad=0.1,
        handlelength=1.4, handleheight=0.8, columnspacing=1.4, handletextpad=0.5, bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip


def scale(row: Row) -> bool:
    """Rows with the same answer share an axis scale: real measurements are not squeezed by rehearsals."""
    return row.provenance in REAL


def counts(rows: Sequence[Row]) -> str:
    """How many values the bars of one configuration average, in the order of the bars."""
    numbers = [str(row.n or "\u2013") for row in rows if row.n or row.value is None]
    if not any(row.n for row in rows):
        return ""
    return f"n={numbers[0] if len(set(numbers)) == 1 else '/'.join(numbers)}"


def grouped(
    axes: Axes, rows: Sequence[Row], looks: Mapping[str, Look], letters: Mapping[str, str], turned: bool
) -> None:
    """Draws `rows` as bars grouped by configuration, their values above, upright where `turned`."""
    configs = ordered(row.config for row in rows)
    axes.set_xlim(-0.5, len(configs) - 0.5)
    axes.set_xticks(range(len(configs)))
    width = min(GROUP / len(looks), WIDEST * len(configs) / AXES)
    lift = PAD / _inches(axes) * axes.get_ylim()[1]
    for row in rows:
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


def _value(row: Row, letters: Mapping[str, str]) -> str:
    return marked(row, f"{row.value:.2f}", letters)


def _inches(axes: Axes) -> float:
    return axes.bbox.height / axes.bbox.width * AXES


def _fitted(
    parts: Sequence[Part], looks: Mapping[str, Look], letters: Mapping[str, str]
) -> tuple[bool, float]:
    """Whether values must stand upright to fit over their bars, and the axis limit that leaves them room."""
    shown = [(part, row) for part in parts for row in part.rows if row.value is not None]
    turned = any(
        width_of(_value(row, letters), TINY)
        > AXES / len(ordered(one.config for one in part.rows)) * GROUP / len(looks)
        for part, row in shown
    )
    top = 1.0
    for part, row in shown:
        needs = width_of(_value(row, letters), TINY) if turned else TINY * LINE
        top = max(top, ((row.value or 0) + (row.spread or 0)) / (1 - (needs + 2 * PAD) / part.height))
    return turned, top * 1.01


def ratio_bars(
    parts: Sequence[Part],
    looks: Mapping[str, Look],
    notes: Sequence[str],
    ticks: Mapping[str, str],
    xlabel: str = "",
) -> Figure:
    """A page of panels with speed-up bars; `ticks` names the configurations under their bars."""
    rows = [row for part in parts for row in part.rows]
    letters = marks(rows)
    figure, axes = layout(parts, rows, notes, key=0.2)
    legend(figure, looks, len(looks))
    for one, part in zip(axes, parts, strict=True):
        alike = [other for other in parts if scale(other.rows[0]) == scale(part.rows[0])]
        turned, top = _fitted(alike, looks, letters)
        one.set_ylim(0, top)
        grouped(one, part.rows, looks, letters, turned)
        one.axhline(1, color=GREY, lw=0.4, dashes=(4, 3), zorder=0)
        one.set_axisbelow(True)
        one.yaxis.grid(color=FAINT, linewidth=0.4)
        one.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        one.set_ylabel("Speed-up", size=TEXT, labelpad=2)
        one.tick_params(axis="x", length=0)
        names = [
            f"{ticks[config]}\n{counts([row for row in part.rows if row.config == config])}"
            for config in ordered(row.config for row in part.rows)
        ]
        one.set_xticklabels(names, linespacing=1.25)
        if xlabel:
            one.set_xlabel(xlabel, size=SMALL, labelpad=1.5)
    return figure


def by_cluster(rows: Sequence[Row], height: float, ticks: float) -> list[Part]:
    """One part per cluster."""
    return [
        Part(cluster, [row for row in rows if row.cluster == cluster], height, ticks)
        for cluster in ordered(row.cluster for row in rows)
    ]
