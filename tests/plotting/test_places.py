"""Where things stand in the pictures: labels in what they name, bars that use their panel."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from puzzle.plotting import curves, figure10, figure12, page, style, table3
from puzzle.plotting.irregularities import PUBLISHED
from puzzle.plotting.rows import Row
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.plotting.switch import switch_figure
from puzzle.plotting.timeline import gantt
from puzzle.runlog import load_runs
from tests.plotting import builders
from tests.plotting.test_curves import write_run
from tests.plotting.test_pictures import RUNS, TINY, picture, variety
from tests.plotting.test_timeline import trace


def drawn(figure: Figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def inside(text: Text, patch, renderer, slack: float = 2.0) -> bool:
    """Whether the text's ink lies in the patch, but for some pixels of its line's height."""
    box, room = text.get_window_extent(renderer), patch.get_window_extent(renderer)
    wide = room.x0 - slack <= box.x0 and box.x1 <= room.x1 + slack
    return wide and room.y0 - slack <= box.y0 and box.y1 <= room.y1 + slack


def centre(patch) -> tuple[float, float]:
    x, y = patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2
    return round(float(x), 9), round(float(y), 9)


@pytest.mark.parametrize("runs", [lambda: RUNS, variety], ids=["published", "variety"])
def test_seconds_in_figure12_stand_in_their_stage(runs):
    figure, renderer, _ = picture(figure12, runs(), PUBLISHED)
    written = 0
    for axes in figure.axes:
        patches = [patch for one in axes.containers if isinstance(one, BarContainer) for patch in one]
        centres = {centre(patch): patch for patch in patches if patch.get_width() > 0}
        for text in axes.texts:
            if text.get_ha() != "center" or text.get_gid() == "watermark":
                continue
            x, y = text.get_position()
            assert inside(text, centres[round(float(x), 9), round(float(y), 9)], renderer), text.get_text()
            assert text.get_rotation() in (0.0, 90.0)
            written += 1
    assert written >= 10


@pytest.mark.parametrize("module", [figure8, figure9, figure10, figure11], ids=lambda module: module.NAME)
def test_the_highest_bar_and_its_value_fill_their_panels(module):
    """Panels that share a scale: one of them is filled, none runs over (see test_pictures)."""
    figure, renderer, _ = picture(module, RUNS, PUBLISHED)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    tops = [
        (text.get_window_extent(renderer).y1 - axes.bbox.y0) / axes.bbox.height
        for axes in figure.axes
        for text in axes.texts
    ]
    assert 0.9 < max(tops) <= 1.0


def ratios(*values: float | None) -> list[Row]:
    """Figure 8's rows of one pair, a bar per system; None is a gap."""
    return [
        Row(
            "here",
            "7B/7B",
            name,
            value,
            "1",
            3,
            None if value is None else 0.25,
            ("a",),
            "measured",
            gap="no log",
        )
        for name, value in zip(figure8.systems.values(), values, strict=True)
    ]


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), (None, 2.0, 3.0), (1.0, None, 3.0), (None, None, 3.0)])
def test_bars_stand_side_by_side_around_the_name_of_their_pair(values):
    """Equally wide, apart, in the order of the systems, whether others are there or not; their whiskers and
    values over them."""
    rows = [*ratios(*values), *(replace(row, config="9B/9B") for row in ratios(1.0, 1.5, 1.25))]
    with style.applied():
        figure = figure8.draw(rows, [])
        drawn(figure)
    (axes,) = figure.axes
    bars = [patch for one in axes.containers if isinstance(one, BarContainer) for patch in one]
    shown = [row for row in rows if row.value is not None]
    assert [patch.get_height() for patch in bars] == [row.value for row in shown]
    (width,) = {round(float(patch.get_width()), 9) for patch in bars}
    places = {}
    for row, patch in zip(shown, bars, strict=True):
        places[row.config, row.series] = patch.get_x() + width / 2
    names = list(figure8.systems.values())
    for index, config in enumerate(["7B/7B", "9B/9B"]):
        assert places.get((config, names[1]), index) == pytest.approx(index, abs=1e-6)
        left, right = (
            places.get((config, name), index + side) for name, side in ((names[0], -1), (names[2], 1))
        )
        assert left < index - width < index + width < right
        assert places[config, names[2]] + width / 2 < index + 0.5
    for row in shown:
        (text,) = [t for t in axes.texts if t.get_text() == f"{row.value:.2f}" and
                   abs(t.get_position()[0] - places[row.config, row.series]) < 1e-6]  # fmt: skip
        assert text.get_position()[1] > (row.value or 0.0) + 0.25
        assert text.get_verticalalignment() == "bottom"
    assert [t.get_text() for t in axes.texts].count("no log") == len(rows) - len(shown)


@pytest.mark.parametrize("module", [figure8, figure12], ids=lambda module: module.NAME)
def test_rehearsals_do_not_squeeze_measurements(module):
    """Panels of one kind share a scale, those of the other kind have their own."""
    names = ("e2e", "generation", "inference", "training", "experience")
    printed = dict.fromkeys(names, (9.0, 2.0, 2.0))
    runs = []
    for cluster, provenance, factor in (("a", "measured", 1), ("b", "measured", 2), ("c", "rehearsal", 50)):
        for variant, share in (("dschat", factor), ("base", 1)):
            times = {name: tuple(share * x for x in row) for name, row in printed.items()}
            runs.append(
                builders.run(variant, "7B/7B", times, figures=(module.NAME,), cluster=cluster,
                             provenance=provenance, run_id=f"{cluster}{variant}")
            )  # fmt: skip
    figure, _, _ = picture(module, runs, PUBLISHED)
    limits = [axes.get_ylim() if module is figure8 else axes.get_xlim() for axes in figure.axes]
    assert limits[0] == limits[1]
    assert limits[2][1] > 10 * limits[0][1]
    if module is figure12:
        assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "Execution time (s)"]


@given(st.text(alphabet="abWM .", max_size=30), st.floats(0.1, 3.0), st.floats(2.0, 20.0))
def test_text_that_is_too_wide_is_made_smaller(text, inches, size):
    found = style.fitting(text, inches, size)
    takes = style.width_of(text, size)  # glyphs of other sizes are nearly in proportion
    assert found == (size if takes <= inches else pytest.approx(size * inches / takes))


def test_a_footnote_bears_its_letter_once_and_stands_behind_it():
    notes = [f"{number} " + "words that need a second line " * 4 for number in range(30)]
    rows = [replace(ratios(1.0, 1.0, 1.0)[0], notes=tuple(notes))]
    lines = page._footnotes(rows, ["of all"])
    assert lines[0] == ("", 0.0, "of all")
    letters = [letter for letter, _, _ in lines if letter]
    assert letters == [*"abcdefghijklmnopqrstuvwxyz", "aa", "ab", "ac", "ad"]
    assert len(lines) >= 1 + 2 * 30
    for number in range(30):
        first = [letter for letter, _, _ in lines].index(letters[number])
        assert lines[first][2].startswith(f"{number} ")
        later = [text for letter, _, text in lines[first + 1 :][:1] if not letter]
        assert later
    assert all(indent > style.width_of("ad", style.TINY) for _, indent, _ in lines[1:])


def test_names_of_table3_stay_in_their_column():
    long = [run for run in variety() if run.actor == TINY or run.provenance == "published"]
    figure, renderer, rows = picture(table3, long, PUBLISHED)
    names = {row.config for row in rows}
    found = 0
    for axes in figure.axes:
        per_inch = axes.bbox.width / (axes.get_xlim()[1] - axes.get_xlim()[0])
        for text in axes.texts:
            if text.get_text().replace("\n", "") in names:
                edge = (text.get_window_extent(renderer).x1 - axes.bbox.x0) / per_inch
                assert edge <= table3.NAMES
                found += 1
    assert found == len(names)


def test_numbers_of_micro_batches_stand_in_their_spans():
    with style.applied():
        figure = gantt({"one": trace((0, "forward", "actor", 5, 6), (0, "backward", "actor", 6, 9))})
        renderer = drawn(figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["3", "3"]
    for text, (start, end) in zip(axes.texts, [(0, 1), (1, 4)], strict=True):
        box = axes.transData.inverted().transform(text.get_window_extent(renderer))
        assert start <= box[0, 0] <= box[1, 0] <= end
        assert np.mean(box[:, 0]) == pytest.approx((start + end) / 2, abs=0.05)


@pytest.mark.parametrize(("seeds", "said"), [(1, ""), (2, ", 2 seeds"), (3, ", 3 seeds")])
def test_curves_say_how_many_seeds_they_are_of(tmp_path, seeds, said):
    for seed in range(seeds):
        write_run(tmp_path / str(seed), [1.0, 2.0 + seed], seed)
    runs = load_runs(tmp_path).runs
    grouped = curves.lines(runs)
    (name,) = grouped
    found = curves.points(name, grouped[name], "reward", 1)
    figure = curves.draw(grouped, found, 1)
    assert [text.get_text() for text in figure.texts] == [f"tiny/tiny puzzle local{said}"]
    assert len(figure.axes[0].lines) == (1 if seeds == 1 else seeds + 1)


def test_a_better_log_without_times_is_named_without_times():
    """The remark on re-sharding that is off; of one of the two runs, or of both, no times are known."""
    layouts = {"training": {"tp": 1, "pp": 8, "dp": 1}, "generation": {"tp": 1, "pp": 8, "dp": 1}}
    other = {**layouts, "generation": {"tp": 2, "pp": 4, "dp": 1}}
    fields = {"provenance": "published", "layouts": layouts}
    for mine, theirs in (({"e2e": (9.0, 3.0)}, {}), ({}, {"e2e": (9.0, 2.0)}), ({}, {})):
        runs = [
            builders.run("dschat", printed={"e2e": (9.0, 8.0)}, provenance="published"),
            builders.run("opt", printed=mine, **fields),
            builders.run(
                "opt", printed=theirs, source="better.log", figures=("figure11",), run_id="b",
                **{**fields, "layouts": other},
            ),
        ]  # fmt: skip
        rows = {(row.series, row.unit): row for row in figure8.numbers(runs, PUBLISHED)}
        (note,) = rows["PUZZLE", "1"].notes
        assert note.endswith("one with re-sharding on: better.log")


def test_a_stage_that_was_not_timed_hides_no_other():
    """Inference is missing: generation before it and training behind it are drawn, and the gap is said."""
    times = {"generation": (9.0, 3.0), "training": (9.0, 2.0)}
    one = builders.run("base", "7B/7B", figures=("figure12",), printed=times)
    figure, _, rows = picture(figure12, [one], PUBLISHED)
    assert [row.value for row in rows if row.config == "PUZZLE-Base"] == [3.0, None, 2.0, 0.0]
    (axes,) = figure.axes
    patches = [patch for bar in axes.containers if isinstance(bar, BarContainer) for patch in bar]
    drawn_at = [(patch.get_x(), patch.get_width()) for patch in patches if patch.get_width() > 0]
    assert drawn_at == [(0.0, 3.0), (3.0, 2.0)]
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours["5.00 (infer. not timed)"] == style.GREY
    whole = builders.run("base", "7B/7B", figures=("figure12",), printed={**times, "inference": (9.0, 1.0)})
    (axes,) = picture(figure12, [whole], PUBLISHED)[0].axes
    assert {text.get_text(): text.get_color() for text in axes.texts}["6.00"] == style.INK


def test_the_order_of_keys_makes_no_other_line():
    configs = [{"seed": 0, "a": {"x": 1, "y": 2}, "b": 3}, {"b": 3, "a": {"y": 2, "x": 1}, "seed": 1}]
    runs = [builders.run("puzzle", config=config, run_id=str(config)) for config in configs]
    assert [len(group) for group in curves.lines(runs).values()] == [2]
    runs[1] = builders.run("puzzle", config={**configs[1], "b": 4}, run_id="other")
    assert [len(group) for group in curves.lines(runs).values()] == [1, 1]


def luminance(colour) -> float:
    """Relative luminance of an sRGB colour, as in the Web Content Accessibility Guidelines."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), parts))


@pytest.mark.parametrize("count", [4, 16, 17, 20])
def test_a_switch_is_drawn_to_the_edges_and_readable(count):
    """Rank r sends r + 1 GB to its neighbour: every shade from the faintest to the fullest."""
    ranks = [{"rank": r, "local_bytes": 1e9, "received_bytes": (r + 1) * 1e9} for r in range(count)]
    pairs = [{"source": r, "destination": (r + 1) % count, "bytes": (r + 1) * 1e9} for r in range(count)]
    layout = {"tp": 1, "pp": count, "dp": 1}
    numbers = {"ranks": ranks, "pairs": pairs, "from": layout, "to": layout, "strategy": "similar"}
    figure = switch_figure({**numbers, "local_share": 0.25, "bytes_received": 5e9})
    renderer = drawn(figure)
    matrix, bars = figure.axes
    width = figure.bbox.width
    for axes in (matrix, bars):
        box = axes.get_tightbbox(renderer)
        assert box is not None
        assert 0 <= box.x0 <= 0.06 * width
        assert 0.94 * width <= box.x1 <= width
    # A square matrix over the bars, the title over both, all on the page.
    inches = [axes.bbox.transformed(figure.dpi_scale_trans.inverted()) for axes in (matrix, bars)]
    assert inches[0].width == pytest.approx(inches[0].height)
    assert inches[0].width == pytest.approx(inches[1].width)
    (title,) = figure.texts
    assert title.get_window_extent(renderer).x0 + title.get_window_extent(renderer).x1 == pytest.approx(
        width, abs=2
    )
    every = 1 if count <= 16 else 2
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels(), bars.get_xticklabels()):
        assert [label.get_text() for label in labels] == [str(rank) for rank in range(0, count, every)]
    assert title.get_text() == f"1,{count},1 to 1,{count},1 (similar): 25% stays, 5.00 GB move"
    stack = [title.get_window_extent(renderer), *(axes.get_tightbbox(renderer) for axes in (matrix, bars))]
    edges = [figure.bbox.height, *(edge for box in stack for edge in ((box.y1, box.y0) if box else ())), 0.0]
    assert edges == sorted(edges, reverse=True)
    heights = [(patch.get_y(), patch.get_height()) for one in bars.containers for patch in one]
    assert heights == [(0.0, 1.0)] * count + [(1.0, rank + 1.0) for rank in range(count)]
    assert bars.get_ylim()[1] > count + 1.0
    (image,) = matrix.images
    array = image.get_array()
    assert array is not None
    shades = np.asarray(array)
    cells = {(int(text.get_position()[0]), int(text.get_position()[1])): text for text in matrix.texts}
    assert set(cells) == ({((r + 1) % count, r) for r in range(count)} if count <= 16 else set())
    for (column, row), text in cells.items():
        assert text.get_text() == f"{row + 1:.2g}"
        ground = luminance(image.cmap(image.norm(shades[row, column]))[:3])
        ink = luminance(text.get_color())
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 3.8
