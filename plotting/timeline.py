"""Gantt charts of timelines, from their Chrome traces: a panel per trace, a bar per row, all on one time
axis. `python -m puzzle.plotting.timeline OUT TITLE=TRACE.json ...` draws traces that runs left."""

from puzzle.errors import UserError, exit_code, say_signals
from puzzle.files.path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is looked for
    say_signals()

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from puzzle.files.jsonio import Fields, read_object
from puzzle.plotting.output import whole
from puzzle.plotting.style import (
    COLUMN,
    GREY,
    INK,
    MIDDLE,
    OTHER,
    OURS,
    SMALL,
    TEXT,
    TINY,
    applied,
    save,
    width_of,
)

WIDTH = 2 * COLUMN
LEFT, RIGHT, TOP, BOTTOM = 0.55, 0.08, 0.42, 0.34
"""Inches around the panels."""
ROW, GAP = 0.17, 0.26
"""Inches: a row, and between two panels (their titles)."""
COLOURS = (OURS, OTHER, MIDDLE, GREY)
LANE = "compute"
TINTS = {"forward": 0.45, "prefill": 0.45, "backward": 0.0, "decode": 0.0}
TINTS |= {"backward_input": 0.0, "backward_weight": 0.7}
"""How far a pass's colour is moved to white; other spans of the lane (optimizer steps) are hatched."""
DARK = 1.5
"""Sum of red, green and blue below which text is white."""


def gantt(traces: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws the compute lanes of Chrome traces (title -> trace). Seconds count from each trace's first span.

    ValueError where no trace holds a span of a compute lane.
    """
    panels = {title: _lanes(title, trace) for title, trace in traces.items()}
    models = sorted({e["args"]["model"] for rows in panels.values() for row in rows.values() for e in row})
    if not models:
        raise ValueError(f"no spans of a {LANE} lane in {', '.join(traces)}")
    colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    heights = [ROW * len(rows) for rows in panels.values()]
    tall = TOP + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
    end = max(_end(row) for rows in panels.values() for row in rows.values())
    with applied():
        figure = Figure(figsize=(WIDTH, tall))
        below = tall - TOP
        for (title, rows), height in zip(panels.items(), heights, strict=True):
            below -= height
            box = (LEFT / WIDTH, below / tall, (WIDTH - LEFT - RIGHT) / WIDTH, height / tall)
            _panel(figure.add_axes(box), title, rows, colours, end)
            below -= GAP
        figure.axes[-1].set_xlabel("seconds", fontsize=SMALL)
        figure.axes[-1].tick_params(labelbottom=True)
        handles = [Patch(color=colour, label=model) for model, colour in colours.items()]
        figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=SMALL, frameon=False)
    return figure


def _lanes(title: str, trace: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The spans of every row's compute lane by the row's name, times in seconds from the trace's first
    span. UserError for values that no trace has."""
    events = Fields(trace, title).objects("traceEvents")
    kinds = {kind: [e for e in events if e.text("name") == kind] for kind in ("process_name", "thread_name")}
    names = {e.integer("pid"): e.section("args").text("name") for e in kinds["process_name"]}
    threads = {
        (e.integer("pid"), e.integer("tid"))
        for e in kinds["thread_name"]
        if e.section("args").text("name") == LANE
    }
    spans = [e for e in events if e.text("ph") == "X"]
    first = min((e.number("ts") for e in spans), default=0.0)
    rows: dict[str, list[dict[str, Any]]] = {names[pid]: [] for pid, _ in sorted(threads)}
    for e in spans:
        if (e.integer("pid"), e.integer("tid")) in threads:
            args = e.section("args")
            span = {
                "ts": (e.number("ts") - first) / 1e6,
                "dur": e.number("dur", least=0.0) / 1e6,
                "cat": e.text("cat"),
                "args": {"model": args.text("model"), "microbatch": args.integer("microbatch", least=-1)},
            }
            rows[names[e.integer("pid")]].append(span)
    return rows


def _end(row: Sequence[Mapping[str, Any]]) -> float:
    return max((e["ts"] + e["dur"] for e in row), default=0.0)


def _panel(
    axes: Axes,
    title: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Mapping[str, str],
    end: float,
) -> None:
    scale = (WIDTH - LEFT - RIGHT) / end
    for y, row in enumerate(rows.values()):
        patches, faces = [], []
        for e in row:
            face = _tint(colours[e["args"]["model"]], TINTS.get(e["cat"], 0.0))
            patches.append(Rectangle((e["ts"], y - 0.42), e["dur"], 0.84))
            faces.append(face)
            if e["cat"] not in TINTS:
                axes.add_patch(
                    Rectangle((e["ts"], y - 0.42), e["dur"], 0.84, fill=False, hatch="////", lw=0.2)
                )
            number = str(e["args"]["microbatch"])
            if e["args"]["microbatch"] >= 0 and width_of(number, TINY) < 0.9 * e["dur"] * scale:
                ink = "white" if sum(face) < DARK else INK
                axes.text(e["ts"] + e["dur"] / 2, y, number, size=TINY, ha="center", va="center", color=ink)
        axes.add_collection(
            PatchCollection(patches, facecolor=faces, edgecolor="white", linewidth=0.2, zorder=0)
        )
    axes.set_xlim(0, end)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=SMALL)
    axes.tick_params(length=2, labelsize=SMALL, labelbottom=False)
    axes.set_title(title, fontsize=TEXT, loc="left", pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _tint(colour: str, share: float) -> tuple[float, ...]:
    return tuple(c + (1 - c) * share for c in to_rgb(colour))


def run(arguments: Sequence[str]) -> None:
    """Writes NAME.png and NAME.pdf into the folder of OUT. UserError for files that are no traces."""
    parser = argparse.ArgumentParser("python -m puzzle.plotting.timeline", description="Draw Chrome traces.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the picture's name, without its ending")
    parser.add_argument("traces", nargs="+", metavar="TITLE=TRACE.json", help="a panel each, from the top")
    given = parser.parse_args(arguments)
    traces: dict[str, Any] = {}
    for word in given.traces:
        title, _, file = word.partition("=")
        if not file:
            raise UserError(f"{word}: write TITLE=TRACE.json")
        traces[title] = read_object(Path(file))
    try:
        figure = gantt(traces)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{', '.join(traces)}: no Chrome trace ({error})") from None
    with whole(given.out.parent) as folder:
        save(figure, folder / given.out.name)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:])))
