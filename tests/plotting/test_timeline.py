"""Gantt charts hold every span of the compute lanes where it belongs."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PatchCollection

from plotting.timeline import gantt, run
from puzzle.errors import UserError


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
