"""How pictures look: fonts, colours, text in a given width, files that depend on nothing but the numbers."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.textpath import text_to_path

COLUMN = 3.33
"""Inches: one column of a two-column page."""
DPI = 300
TITLE_SIZE, TEXT, SMALL, TINY = 8.0, 7.0, 6.0, 5.5
LINE = 1.25 / 72
"""Inches per point of text size that a line of text takes."""

INK, GREY, FAINT = "#222222", "#6e6e6e", "#d9d9d9"
# Okabe and Ito's colours: told apart under every common colour blindness, and here also by lightness.
BASELINE, MIDDLE, OTHER, OURS = "#b5b5b5", "#56b4e9", "#e69f00", "#0072b2"

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "axes.linewidth": 0.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.4,
    "lines.linewidth": 0.8,
    "text.parse_math": False,
    "savefig.dpi": DPI,
}


@dataclass(frozen=True)
class Look:
    """Colour and hatch of one series, and the colour of text on it."""

    colour: str
    hatch: str = ""
    ink: str = INK


@contextmanager
def applied() -> Generator[None]:
    """The project's look, for drawing and for saving."""
    _own_font_first()
    with matplotlib.rc_context():
        for name, value in RC.items():
            matplotlib.rcParams[name] = value
        yield


def _own_font_first() -> None:
    """Of equally good fonts matplotlib takes the first; its own shall be it, or files depend on the host's
    fonts, and on matplotlib's cache of them, which all environments of a user share."""
    own = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    if all(font.fname != own for font in fontManager.ttflist):
        fontManager.addfont(own)
    fontManager.ttflist.sort(key=lambda font: font.fname != own)


def width_of(text: str, size: float) -> float:
    """Inches that one line of `text` takes at `size` points."""
    points, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return points / 72


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """`text` in lines no wider than `inches`; long names are broken behind a slash or underscore."""
    lines, line = [], ""
    for piece in re.findall(r"\s+|[^\s/_]+[/_]*|[/_]+", text):
        if line and width_of(line + piece.rstrip(), size) > inches:
            lines.append(line.rstrip())
            line = piece.lstrip()
        else:
            line += piece
    return [*lines, line.rstrip()] if line.strip() else lines


STAGES = (
    Look("#0072b2", ink="white"),
    Look("#56b4e9"),
    Look("#f0c36a", "////"),
    Look("#d55e00", ink="white"),
)
"""Generation, inference, training, communication."""


def fitting(text: str, inches: float, size: float) -> float:
    """The size in points, at most `size`, at which `text` is no wider than `inches`."""
    return min(size, size * inches / max(width_of(text, size), 1e-6))


def page(panel_inches: Sequence[float], top: float, bottom: float) -> Figure:
    """An empty page one column wide: `top` inches, the panels' heights, `bottom` inches."""
    return Figure(figsize=(COLUMN, top + sum(panel_inches) + bottom), dpi=DPI)


def save(figure: Figure, stem: Path) -> None:
    """Writes `stem`.pdf and `stem`.png; equal figures give equal bytes."""
    figure.savefig(stem.with_suffix(".png"), metadata={"Software": None})
    blank = {"Creator": None, "Producer": None, "CreationDate": None}
    figure.savefig(stem.with_suffix(".pdf"), metadata=blank)
