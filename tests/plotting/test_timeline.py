"""Gantt charts hold every span of the compute lanes where it belongs."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PatchCollection

from puzzle.errors import UserError
from puzzle.plotting.style import TINY, width_of
from puzzle.plotting.timeline import LEFT, RIGHT, WIDTH, gantt, run


def trace(*spans: tuple[int, str, str, float, float]) -> dict:
    """A Chrome trace of (row, category, model, start, end) on compute lanes, and a transfer on thread 9."""
    rows = sorted({row for row, *_ in spans})
    events: list[dict] = [
        {"name": "process_name", "ph": "M", "pid": r, "args": {"name": f"stage {r}"}} for r in rows
    ]
    events += [
        {"name": "thread_name", "ph": "M", "pid": r, "tid": r, "args": {"name": "compute"}} for r in rows
    ]
    events += [{"name": "thread_name", "ph": "M", "pid": 0, "tid": 9, "args": {"name": "activation to 1"}}]
    for row, category, model, start, end in spans:
        args = {"model": model, "microbatch": 3}
        times = {"ts": start * 1e6, "dur": (end - start) * 1e6}
        events.append(
            {"name": "x", "ph": "X", "cat": category, "pid": row, "tid": row, "args": args, **times}
        )
    moving = {"name": "x", "ph": "X", "cat": "activation", "pid": 0, "tid": 9, "ts": 6e6, "dur": 4e6}
    return {"traceEvents": [*events, {**moving, "args": {"model": "actor", "microbatch": 0}}]}


def test_bars_are_the_spans() -> None:
    short = trace((0, "forward", "actor", 5, 6), (1, "forward", "actor", 6, 8), (1, "step", "critic", 8, 9))
    long = trace((0, "backward", "critic", 5, 17))
    figure = gantt({"short": short, "long": long})
    first, second = figure.axes
    assert [a.get_title(loc="left") for a in figure.axes] == ["short", "long"]
    assert first.get_xlim() == second.get_xlim() == (0, 12)
    assert [t.get_text() for t in first.get_yticklabels()] == ["stage 0", "stage 1"]
    bars = [c for c in first.collections if isinstance(c, PatchCollection)]
    boxes = [path.get_extents() for c in bars for path in c.get_paths()]
    assert [(b.x0, b.x1, round((b.y0 + b.y1) / 2)) for b in boxes] == [(0, 1, 0), (1, 3, 1), (3, 4, 1)]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["actor", "critic"]
    faces = [str(face) for bar in bars for face in np.asarray(bar.get_facecolor())]
    assert faces[0] == faces[1] != faces[2]


def test_a_stage_that_did_nothing_is_an_empty_row() -> None:
    """It neither hides the others nor lengthens the axis, wherever it stands."""
    for idle in (0, 1):
        busy = (1 - idle, "forward", "actor", 5.0, 5.5)
        one = trace((idle, "forward", "actor", 5.0, 5.25), busy)
        spans = [event for event in one["traceEvents"] if event["ph"] == "X"]
        gone = [event for event in spans if event["pid"] == idle or event["tid"] == 9]
        one["traceEvents"] = [event for event in one["traceEvents"] if event not in gone]
        (axes,) = gantt({"one": one}).axes
        assert axes.get_xlim() == (0, 0.5)
        assert [t.get_text() for t in axes.get_yticklabels()] == ["stage 0", "stage 1"]
        boxes = [path.get_extents() for c in axes.collections for path in c.get_paths()]
        assert [(b.x0, b.x1, round((b.y0 + b.y1) / 2)) for b in boxes] == [(0, 0.5, 1 - idle)]


def test_what_is_no_pass_is_hatched_and_bears_no_number() -> None:
    """Passes are told by their tint, backward by the full colour; optimizer steps by a hatch over theirs."""
    one = trace((0, "forward", "actor", 0, 4), (0, "backward", "actor", 4, 8), (0, "step", "actor", 8, 12))
    one["traceEvents"][-2]["args"]["microbatch"] = -1
    (axes,) = gantt({"one": one}).axes
    (hatched,) = axes.patches
    assert hatched.get_hatch()
    assert not hatched.get_fill()
    extents = hatched.get_extents()
    corners = axes.transData.inverted().transform(extents.get_points())
    assert corners[:, 0] == pytest.approx([8, 12])
    (bars,) = (c for c in axes.collections if isinstance(c, PatchCollection))
    (span,) = [path.get_extents() for path in bars.get_paths()][2:]
    assert corners[:, 1][::-1] == pytest.approx([span.y0, span.y1])
    forward, backward, step = np.asarray(bars.get_facecolor())
    assert list(backward) == list(step) != list(forward)
    assert forward[:3].sum() > backward[:3].sum()
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((2, 0), "3"), ((6, 0), "3")]


def test_traces_stand_below_each_other_and_share_their_axis() -> None:
    """Rows have one height whichever panel they are in; nothing lies outside of the page."""
    rows = [(row, "forward", "actor", 0.0, 4.0) for row in range(3)]
    figure = gantt({"three": trace(*rows), "one": trace(rows[0]), "two": trace(*rows[:2])})
    tall = figure.get_figheight()
    boxes = [axes.get_position() for axes in figure.axes]
    heights = [tall * box.height for box in boxes]
    assert [height / heights[1] for height in heights] == pytest.approx([3, 1, 2])
    assert [round(box.x0, 9) for box in boxes] == [round(boxes[0].x0, 9)] * 3
    assert boxes[0].x1 == boxes[1].x1 == boxes[2].x1 < 1
    assert all(one.y0 > other.y1 for one, other in pairwise(boxes))
    assert 0 < boxes[2].y0 < boxes[0].y1 < 1
    for axes, count in zip(figure.axes, (3, 1, 2), strict=True):
        assert axes.get_ylim() == (count - 0.5, -0.5)
        last = axes is figure.axes[-1]
        assert axes.get_xlabel() == ("seconds" if last else "")
        assert axes.xaxis.get_tick_params()["labelbottom"] is last


@pytest.mark.parametrize(("room", "written"), [(0.8, False), (1.05, False), (1.2, True), (3.0, True)])
def test_a_number_is_written_where_it_has_room(room: float, written: bool) -> None:
    """`room` times the number's width is the span's; a tenth is left free."""
    inches = room * width_of("3", TINY)
    one = trace((0, "forward", "actor", 0, inches), (0, "step", "actor", inches, WIDTH - LEFT - RIGHT))
    one["traceEvents"][-2]["args"]["microbatch"] = -1
    (axes,) = gantt({"one": one}).axes
    assert [text.get_text() for text in axes.texts] == ["3"] * written


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no spans of a compute lane in empty"):
        gantt({"empty": {"traceEvents": []}})


def test_traces_of_runs_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(trace((0, "forward", "actor", 0.0, 1.0))))
    run([str(tmp_path / "drawn" / "both"), f"apart={tmp_path}/a.json", f"fused={tmp_path}/a.json"])
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == {"both.png", "both.pdf"}
    (tmp_path / "b.json").write_text("[]")
    for wrong in ("a=missing.json", "a.json", f"a={tmp_path}/b.json"):
        with pytest.raises(UserError):
            run([str(tmp_path / "nothing"), wrong])
    assert not (tmp_path / "nothing.png").exists()
