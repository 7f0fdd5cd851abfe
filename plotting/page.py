"""One column of panels with a legend above and footnotes below."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from puzzle.plotting.rows import Row, ordered
from puzzle.plotting.selection import REAL
from puzzle.plotting.style import (
    COLUMN,
    GREY,
    INK,
    LINE,
    SMALL,
    TINY,
    TITLE_SIZE,
    Look,
    fitting,
    page,
    width_of,
    wrapped,
)

LEFT, RIGHT, EDGE = 0.42, 0.06, 0.06
"""Inches: left of the axes, right of them, around everything."""
TITLE, INDENT = 0.17, 0.1
"""Inches: a panel's title; a footnote behind its letter."""


@dataclass(frozen=True)
class Part:
    """One panel: its title, its rows, and inches of axes and of tick labels below them."""

    title: str
    rows: Sequence[Row]
    height: float
    ticks: float


def parts_of(rows: Sequence[Row], title: Callable[[Row], str], height: float, ticks: float) -> list[Part]:
    """One part per title."""
    return [
        Part(name, [row for row in rows if title(row) == name], height, ticks)
        for name in ordered(title(row) for row in rows)
    ]


def split(part: Part, most: int) -> list[Part]:
    """The part, or several below each other with at most `most` configurations each."""
    configs = ordered(row.config for row in part.rows)
    pieces = [configs[start : start + most] for start in range(0, len(configs), most)]
    return [
        replace(
            part,
            title=part.title if index == 0 else f"{part.title}, continued",
            rows=[row for row in part.rows if row.config in piece],
        )
        for index, piece in enumerate(pieces)
    ]


def by_cluster(row: Row) -> str:
    """A panel's title where every cluster has one panel."""
    return row.cluster


def marks(rows: Sequence[Row]) -> dict[str, str]:
    """A letter for every distinct footnote of `rows`, in order of appearance."""
    notes = ordered(note for row in rows for note in row.notes)
    return {note: _letter(index) for index, note in enumerate(notes)}


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def marked(row: Row, text: str, letters: Mapping[str, str]) -> str:
    """`text` with the letters of the row's footnotes."""
    return f"{text} {','.join(letters[note] for note in row.notes)}" if row.notes else text


def seconds(value: float) -> str:
    """Two decimals, as published; below a hundredth of a second two digits that count."""
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def layout(
    parts: Sequence[Part], rows: Sequence[Row], notes: Sequence[str], key: float, left: float = LEFT
) -> tuple[Figure, list[Axes]]:
    """A page with one axes per part, `left` inches in, under `key` inches of legend; footnotes below."""
    lines = _footnotes(rows, notes)
    foot = len(lines) * TINY * LINE + 2 * EDGE
    figure = page([TITLE + part.height + part.ticks for part in parts], key + EDGE, foot)
    height = figure.get_figheight()
    axes, at = [], height - key - EDGE
    for part in parts:
        at -= TITLE + part.height
        box = (left / COLUMN, at / height, (COLUMN - left - RIGHT) / COLUMN, part.height / height)
        axes.append(_dressed(figure.add_axes(box), part))
        size = fitting(part.title, COLUMN - left - RIGHT, TITLE_SIZE)
        figure.text(left / COLUMN, (at + part.height + 0.035) / height, part.title, size=size)
        at -= part.ticks
    for index, (letter, indent, text) in enumerate(lines):
        y = (foot - EDGE - (index + 1) * TINY * LINE + 0.01) / height
        if letter:
            figure.text(EDGE / COLUMN, y, letter, size=TINY, color=INK)
        figure.text((EDGE + indent) / COLUMN, y, text, size=TINY, color=GREY)
    return figure, axes


def _footnotes(rows: Sequence[Row], notes: Sequence[str]) -> list[tuple[str, float, str]]:
    """Lines of letter, indent in inches, and text."""
    lines = [("", 0.0, line) for note in notes for line in wrapped(note, COLUMN - 2 * EDGE, TINY)]
    letters = marks(rows)
    indent = max([INDENT, *(width_of(letter, TINY) + 0.04 for letter in letters.values())])
    for note, letter in letters.items():
        for index, line in enumerate(wrapped(note, COLUMN - 2 * EDGE - indent, TINY)):
            lines.append((letter if index == 0 else "", indent, line))
    return lines


def _dressed(axes: Axes, part: Part) -> Axes:
    """Without the box, with small ticks, and with a watermark where the numbers are no real measurements."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=2, width=0.5, pad=1.5, labelsize=SMALL)
    made = ordered(
        row.provenance for row in part.rows if row.provenance not in REAL and row.value is not None
    )
    if made:
        axes.text(
            0.5, 0.5, " + ".join(made), transform=axes.transAxes, size=20, color=GREY, alpha=0.28,
            ha="center", va="center", rotation=12, zorder=5, gid="watermark",
        )  # fmt: skip
    return axes


def legend(figure: Figure, looks: Mapping[str, Look], columns: int) -> None:
    """The key of the series, at the head of the page."""
    handles = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor=INK, linewidth=0.4, label=name)
        for name, look in looks.items()
    ]
    figure.legend(
        handles=handles, loc="upper center", ncols=columns, frameon=False, borderpad=0.1,
        handlelength=1.4, handleheight=0.8, columnspacing=1.4, handletextpad=0.5, bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip


def same_scale(parts: Sequence[Part], part: Part) -> list[Part]:
    """The parts that share an axis scale with `part`: real measurements are not squeezed by rehearsals."""
    return [other for other in parts if real(other.rows[0]) == real(part.rows[0])]


def real(row: Row) -> bool:
    """Whether the number was measured on the experiment itself."""
    return row.provenance in REAL


def counts(rows: Sequence[Row]) -> str:
    """How many values the bars of one configuration average, in the order of the bars."""
    numbers = [str(row.n or "-") for row in rows if row.n or row.value is None]
    if not any(row.n for row in rows):
        return ""
    return f"n={numbers[0] if len(set(numbers)) == 1 else '/'.join(numbers)}"
