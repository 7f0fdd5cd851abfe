"""Who sends how much to whom in a switch of layouts, and what each rank has already."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puzzle.plotting.style import BASELINE, COLUMN, INK, OURS, SMALL, TINY, applied

GB = 1e9
LEFT, RIGHT, TOP, BETWEEN, BOTTOM = 0.42, 0.12, 0.34, 0.5, 0.34
"""Inches around and between the panels."""
BARS = 0.9
LABELLED = 16
"""Ranks beyond which cells carry no numbers and not every rank is named."""


def switch_figure(numbers: Mapping[str, Any]) -> Figure:
    """Draws the numbers of a switch plan (`puzzle plan switch --json`): senders down, receivers across."""
    ranks = [row["rank"] for row in numbers["ranks"]]
    place = {rank: i for i, rank in enumerate(ranks)}
    sent = np.zeros((len(ranks), len(ranks)))
    for pair in numbers["pairs"]:
        sent[place[pair["source"]], place[pair["destination"]]] = pair["bytes"] / GB
    side = COLUMN - LEFT - RIGHT
    tall = TOP + side + BETWEEN + BARS + BOTTOM
    with applied():
        figure = Figure(figsize=(COLUMN, tall))
        width = side / COLUMN
        matrix = figure.add_axes((LEFT / COLUMN, (BOTTOM + BARS + BETWEEN) / tall, width, side / tall))
        _matrix(matrix, sent, ranks)
        bars = figure.add_axes((LEFT / COLUMN, BOTTOM / tall, width, BARS / tall))
        _bars(bars, numbers["ranks"], ranks)
        title = (
            f"{_layout(numbers['from'])} to {_layout(numbers['to'])} ({numbers['strategy']}):"
            f" {numbers['local_share']:.0%} stays, {numbers['bytes_received'] / GB:.2f} GB move"
        )
        figure.text(0.5, 1 - 0.12 / tall, title, ha="center", va="center")
    return figure


def _layout(side: Mapping[str, Any]) -> str:
    return f"{side['tp']},{side['pp']},{side['dp']}"


def _matrix(axes: Axes, sent: np.ndarray, ranks: list[int]) -> None:
    most = sent.max() or 1.0
    axes.imshow(np.ma.masked_equal(sent, 0.0), cmap="Blues", vmin=0.0, vmax=most)
    axes.set_xlabel("receiver", fontsize=SMALL)
    axes.set_ylabel("sender", fontsize=SMALL)
    every = -(-len(ranks) // LABELLED)
    shown = range(0, len(ranks), every)
    axes.set_xticks(shown, [str(ranks[i]) for i in shown], fontsize=TINY)
    axes.set_yticks(shown, [str(ranks[i]) for i in shown], fontsize=TINY)
    if len(ranks) <= LABELLED:
        for row, column in zip(*np.nonzero(sent), strict=True):
            value = sent[row, column]
            ink = "white" if value > 0.67 * most else INK
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=TINY)


def _bars(axes: Axes, rows: list[Mapping[str, Any]], ranks: list[int]) -> None:
    at = np.arange(len(ranks))
    local = np.array([row["local_bytes"] for row in rows]) / GB
    received = np.array([row["received_bytes"] for row in rows]) / GB
    axes.bar(at, local, color=BASELINE, label="has already")
    axes.bar(at, received, bottom=local, color=OURS, label="receives")
    axes.set_xlim(-0.5, len(ranks) - 0.5)
    axes.set_ylim(0, 1.35 * max(float((local + received).max()), 1e-12))
    shown = range(0, len(ranks), -(-len(ranks) // LABELLED))
    axes.set_xticks(shown, [str(ranks[i]) for i in shown], fontsize=TINY)
    axes.tick_params(axis="y", labelsize=TINY)
    axes.set_xlabel("rank", fontsize=SMALL)
    axes.set_ylabel("GB", fontsize=SMALL)
    axes.legend(fontsize=TINY, frameon=False, ncols=2, loc="upper center")
