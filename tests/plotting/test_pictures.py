"""The pictures: nothing overlaps or is cut, gaps and rehearsals are labelled, equal logs give equal files."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.text import Text

from puzzle.plotting import figure10, figure12, page, style, table3
from puzzle.plotting.irregularities import CORRECTED, PUBLISHED
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog import load_runs
from puzzle.runlog.records import Note
from tests.plotting import builders

MODULES = (figure8, figure9, figure10, figure11, figure12, table3)
RUNS = load_runs(builders.PUBLISHED).runs
TINY = "SmolLM2-135M-Instruct"


def variety():
    """The published runs, and the same numbers under other clusters, names, provenances and repeats."""
    square = [run for run in RUNS if run.actor == run.critic and run.cluster == "orion"]
    laptop = {"cluster": "laptop-with-a-long-name", "provenance": "rehearsal"}
    plain = [replace(run, records=tuple(r for r in run.records if not isinstance(r, Note))) for run in square]
    runs = [*RUNS]
    runs += [replace(run, actor=TINY, critic=TINY, **laptop) for run in plain]
    runs += [replace(run, actor=TINY, critic="tiny", **laptop) for run in plain]
    many = [run for run in square if run.figures[0] not in ("figure10", "figure12")]
    for size in range(1, 10):
        runs += [replace(run, actor=f"{size}B", cluster="h200", provenance="measured") for run in many]
    for repeat in range(3):
        runs += [
            replace(
                run, repeat=repeat, cluster="twice", provenance="measured", source=f"{run.source}-{repeat}"
            )
            for run in RUNS
            if run.cluster == "phoenix"
        ]
    return runs


def gappy():
    """The published runs without some variants and baselines."""
    return [
        run
        for run in RUNS
        if (run.actor, run.critic, run.variant) not in {("7B", "7B", "opt"), ("13B", "350M", "dschat")}
        and not (run.variant == "w_bulk" and run.cluster == "orion")
    ]


def picture(module, runs, reading):
    rows = module.numbers(runs, reading)
    with style.applied():
        figure = module.draw(rows, module.notes(rows))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, canvas.get_renderer(), rows


def hidden_ticks(figure):
    """Labels of ticks outside the axis limits, which are not drawn."""
    return {
        id(tick.label1)
        for axes in figure.axes
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if not min(limits) - 1e-9 <= tick.get_loc() <= max(limits) + 1e-9
    }


def boxes(figure, renderer):
    hidden = hidden_ticks(figure)
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text().strip()
        and text.get_visible()
        and text.get_gid() != "watermark"
        and id(text) not in hidden
    ]


@pytest.mark.parametrize(
    ("runs", "reading"),
    [(lambda: RUNS, PUBLISHED), (lambda: RUNS, CORRECTED), (gappy, PUBLISHED), (variety, PUBLISHED)],
    ids=["published", "corrected", "gappy", "variety"],
)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_no_text_overlaps_or_is_cut_off(module, runs, reading):
    figure, renderer, _ = picture(module, runs(), reading)
    found = boxes(figure, renderer)
    assert len(found) > 10
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in found:
        assert -1 <= box.x0 <= box.x1 <= width + 1, text
        assert -1 <= box.y0 <= box.y1 <= height + 1, text
    # Extents include the space of letters that are not there: a few pixels of 300 dpi may meet.
    clashes = [
        (one[0], other[0])
        for one, other in combinations(found, 2)
        if min(one[1].x1, other[1].x1) - max(one[1].x0, other[1].x0) > 3
        and min(one[1].y1, other[1].y1) - max(one[1].y0, other[1].y0) > 4
    ]
    assert clashes == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_readable_at_column_width(module):
    figure, _, _ = picture(module, RUNS, PUBLISHED)
    assert figure.get_figwidth() == pytest.approx(3.33)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 5.5


def test_every_value_stands_above_its_bar():
    figure, renderer, rows = picture(figure8, RUNS, PUBLISHED)
    bars = [
        (patch.get_x() + patch.get_width() / 2, patch.get_height())
        for axes in figure.axes
        for container in axes.containers
        if isinstance(container, BarContainer)
        for patch in container
    ]
    shown = [row for row in rows if row.unit == "1"]
    assert sorted(height for _, height in bars) == pytest.approx(sorted(row.value for row in shown))
    labels = [text for text, _ in boxes(figure, renderer)]
    for row in shown:
        assert any(re.fullmatch(rf"{row.value:.2f}( [a-z])?", label) for label in labels)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.1067, "7.11"),
        (0.0847, "0.08"),
        (0.01, "0.01"),
        (0.0149, "0.01"),
        (0.00123, "0.0012"),
        (0.0, "0.00"),
    ],
)
def test_seconds_of_toys_are_no_zeros(value, text):
    assert page.seconds(value) == text


def test_a_panel_per_cluster_and_n_under_every_pair():
    figure, renderer, rows = picture(figure8, RUNS, PUBLISHED)
    texts = [text for text, _ in boxes(figure, renderer)]
    assert texts.count("orion") == texts.count("phoenix") == 1
    assert len(figure.axes) == 2
    assert "7B/350M\nn=4/5/5" in texts
    assert len([text for text in texts if "\nn=" in text]) == len({(row.cluster, row.config) for row in rows})


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_gaps_are_labelled(module):
    figure, renderer, rows = picture(module, gappy(), PUBLISHED)
    gaps = [row for row in rows if row.value is None and (row.unit == "1" or module in (figure12, table3))]
    labels = [text for text, _ in boxes(figure, renderer)]
    written = sum(label in ("no log", "no baseline", "no theory") for label in labels)
    assert written == (len(gaps) // 4 if module is figure12 else len(gaps)) > 0


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_rehearsals_are_watermarked_and_apart(module):
    figure, _, rows = picture(module, variety(), PUBLISHED)
    marked = [axes for axes in figure.axes if any(text.get_gid() == "watermark" for text in axes.texts)]
    assert 0 < len(marked) < len(figure.axes)
    for axes in figure.axes:
        watermark = [text.get_text() for text in axes.texts if text.get_gid() == "watermark"]
        assert watermark == (["rehearsal"] if axes in marked else [])
    for axes in marked:  # in the middle of its panel, whatever the axes measure
        (mark,) = (text for text in axes.texts if text.get_gid() == "watermark")
        middle = mark.get_transform().transform(mark.get_position())
        assert axes.transAxes.inverted().transform(middle).tolist() == pytest.approx([0.5, 0.5])
    made = {row.cluster: set() for row in rows}
    for row in rows:
        made[row.cluster].add(row.provenance)
    assert all(len(kinds) == 1 for kinds in made.values())
    toys = [run for run in variety() if run.provenance == "rehearsal"]
    assert len(picture(module, toys, PUBLISHED)[0].axes) == len(marked)
    plain, _, _ = picture(module, RUNS, PUBLISHED)
    assert not [text for text in plain.findobj(Text) if text.get_gid() == "watermark"]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_every_remark_is_a_footnote(module):
    figure, renderer, rows = picture(module, RUNS, CORRECTED)
    everything = re.sub(r"\W", "", "".join(text for text, _ in boxes(figure, renderer)))
    for note in [*module.notes(rows), *(note for row in rows if row.unit == "1" for note in row.notes)]:
        assert re.sub(r"\W", "", note) in everything


def test_equal_logs_give_equal_bytes(tmp_path):
    for index in range(2):
        line = [
            sys.executable,
            "-m",
            "puzzle.plotting",
            "--out",
            str(tmp_path / str(index)),
            "--only",
            "figure8",
            "table3",
        ]
        environment = {**os.environ, "PYTHONHASHSEED": str(index), "TZ": ("UTC", "Asia/Tokyo")[index]}
        subprocess.run(line, cwd=builders.ROOT, env=environment, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_fonts_are_embedded_whole(tmp_path):
    figure, _, _ = picture(figure8, RUNS, PUBLISHED)
    with style.applied():
        style.save(figure, tmp_path / "figure8")
    data = Path(tmp_path / "figure8.pdf").read_bytes()
    assert b"/FontFile2" in data
    assert b"/Type3" not in data
    assert b"CreationDate" not in data
