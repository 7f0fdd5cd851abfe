"""Training curves: reward, KL, losses and lengths over iterations, several seeds with their 95 % intervals.

`python -m puzzle.plotting.curves --logs DIR ... --out DIR`. Runs that differ in nothing but their seed are
one line: the mean over seeds of each seed's means over five iterations (of short runs, of each iteration),
with Student's interval. The interval of a single run's held-out reward is the one over prompts that its log
gives (`reward_ci95`, half its width).
"""

from puzzle.errors import UserError, exit_code, say_signals
from puzzle.files.path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is looked for
    say_signals()

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from puzzle.plotting import style
from puzzle.plotting.loading import load
from puzzle.plotting.options import Parser, folder
from puzzle.plotting.output import whole
from puzzle.plotting.selection import REAL, pair
from puzzle.runlog.run import Run

NAME = "curves"
BLOCK, SHORT = 5, 20
"""Iterations that make a point; runs of fewer than SHORT have a point each."""
HELD_OUT = "held-out reward"
EVALUATED: Mapping[str, str] = {
    HELD_OUT: "reward",
    "held-out loss": "loss",
    "held-out accuracy": "accuracy",
}
"""What evaluations log, by the name of its curve; half its 95 % interval is `NAME_ci95` there."""
MOST_DRAWN = 1e100  # what is larger, infinite or not a number is no point of a curve
# What is drawn where a run has it, with the label of its axis.
METRICS: Mapping[str, str] = {
    "reward": "reward",
    HELD_OUT: HELD_OUT,
    "kl": "KL to the reference",
    "actor_loss": "actor loss",
    "critic_loss": "critic loss",
    "reward_loss": "reward model's loss",
    "held-out loss": "held-out loss",
    "accuracy": "accuracy",
    "held-out accuracy": "held-out accuracy",
    "entropy": "entropy",
    "response_tokens": "response tokens",
    "repetition": "repeated token pairs",
    "logprob_gap_rms": "generation to training, rms nats",
    "first_clip_frac": "clipped before any step",
}
COLOURS = (style.OURS, style.OTHER, style.MIDDLE, style.GREY)
HEIGHT, GAP = 0.95, 0.32


@dataclass(frozen=True)
class Point:
    """The mean over `seeds` runs at `iteration`; `low` and `high` bound its 95 % interval if any."""

    line: str
    metric: str
    iteration: float
    value: float
    low: float | None
    high: float | None
    seeds: int


def student_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its distribution (Abramowitz & Stegun 26.7.3-4)."""
    low, high = 0.0, 20.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), a finite sum in the angle whose tangent is t / sqrt(freedom)."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 if freedom % 2 else 0, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total


def lines(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by what they share but for their seed; a name per line, numbered where names would be the same."""
    grouped: dict[str, list[Run]] = {}
    names: dict[str, str] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in ("seed", "log")}
        key = json.dumps(
            [pair(run), run.variant, run.cluster, run.provenance, config], sort_keys=True, default=str
        )
        grouped.setdefault(key, []).append(run)
        provenance = "" if run.provenance in REAL else f" ({run.provenance})"
        names[key] = f"{pair(run)} {run.variant} {run.cluster}{provenance}"
    taken: dict[str, int] = {}
    found = {}
    for key, group in grouped.items():
        taken[names[key]] = taken.get(names[key], 0) + 1
        number = taken[names[key]]
        found[names[key] if number == 1 else f"{names[key]} #{number}"] = group
    return found


def block_of(runs: Iterable[Run]) -> int:
    """How many iterations make a point of these lines."""
    return BLOCK if max((len(run.iterations) for run in runs), default=0) >= SHORT else 1


def values(run: Run, metric: str, block: int) -> list[tuple[float, float]]:
    """(iteration, finite value) of a run: held-out as it is, others as means over `block` iterations."""
    if (name := EVALUATED.get(metric)) is not None:
        found = [(float(e.iteration), e.metrics.get(name, math.nan)) for e in run.evaluations]
        return [(at, value) for at, value in found if abs(value) < MOST_DRAWN]
    blocks: dict[int, list[tuple[float, float]]] = {}
    for one in run.iterations:
        value = one.metrics.get(metric, math.nan)
        if abs(value) < MOST_DRAWN:
            blocks.setdefault(one.iteration // block, []).append((float(one.iteration), value))
    return [(fmean(at for at, _ in some), fmean(v for _, v in some)) for _, some in sorted(blocks.items())]


def points(name: str, runs: Sequence[Run], metric: str, block: int) -> list[Point]:
    """The line of one metric over several seeds; `seeds` counts the runs that reach an iteration."""
    at: dict[float, list[float]] = {}
    for run in runs:
        for iteration, value in values(run, metric, block):
            at.setdefault(iteration, []).append(value)
    own: dict[float, float] = {}
    if (evaluated := EVALUATED.get(metric)) is not None and len(runs) == 1:
        half_of = f"{evaluated}_ci95"
        own = {float(e.iteration): e.metrics.get(half_of, math.nan) for e in runs[0].evaluations}
        own = {iteration: half for iteration, half in own.items() if abs(half) < MOST_DRAWN}
    found = []
    for iteration, several in sorted(at.items()):
        mean, count = fmean(several), len(several)
        half = own.get(iteration)
        if count > 1:
            half = student_975(count - 1) * stdev(several) / math.sqrt(count)
        low, high = (None, None) if half is None else (mean - half, mean + half)
        found.append(Point(name, metric, iteration, mean, low, high, count))
    return found


def draw(grouped: Mapping[str, Sequence[Run]], found: Sequence[Point], block: int) -> Figure:
    """One panel per metric, all over the same iterations; behind each line its seeds, thin, and its interval,
    shaded."""
    metrics = [metric for metric in METRICS if any(point.metric == metric for point in found)]
    top = 0.12 * len(grouped) + 0.1
    figure = style.page([HEIGHT + GAP] * len(metrics), top, 0.12)
    height, left = figure.get_figheight(), 0.55
    for row, metric in enumerate(metrics):
        bottom = height - top - (row + 1) * (HEIGHT + GAP) + GAP
        box = (left / style.COLUMN, bottom / height, 1 - (left + 0.06) / style.COLUMN, HEIGHT / height)
        _panel(figure.add_axes(box), metric, grouped, found, block)
        if row == len(metrics) - 1:
            means = f"means over {block}; " if block > 1 else ""
            figure.axes[-1].set_xlabel(f"iteration ({means}shaded: 95 % interval)", size=style.SMALL)
    for index, (name, runs) in enumerate(grouped.items()):
        y = (height - 0.12 * (index + 1)) / height
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        colour = COLOURS[index % len(COLOURS)]
        figure.text(left / style.COLUMN, y, f"{name}{seeds}", size=style.SMALL, color=colour)
    return figure


def _panel(
    axes: Axes, metric: str, grouped: Mapping[str, Sequence[Run]], found: Sequence[Point], block: int
) -> None:
    for index, (name, runs) in enumerate(grouped.items()):
        colour = COLOURS[index % len(COLOURS)]
        own = [point for point in found if point.line == name and point.metric == metric]
        for run in runs if len(runs) > 1 else ():
            axes.plot(*zip(*values(run, metric, block), strict=True), color=colour, linewidth=0.4, alpha=0.5)
        bounded = [(p.iteration, p.low, p.high) for p in own if p.low is not None and p.high is not None]
        if bounded:
            at, low, high = zip(*bounded, strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if metric in EVALUATED or block == 1 or len(own) == 1 else None
        axes.plot(
            [p.iteration for p in own], [p.value for p in own], color=colour, marker=marker, markersize=2
        )
    axes.set_ylabel(METRICS[metric], size=style.SMALL)
    last = max(point.iteration for point in found)
    axes.set_xlim(-0.04 * max(last, 1.0), 1.04 * max(last, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=style.TINY, length=2)
    axes.grid(color=style.FAINT, linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def write(runs: Sequence[Run], folder: Path) -> None:
    """Write curves.pdf, .png and .csv into `folder`; raises UserError where no run has a metric."""
    shown = [run for run in runs if any(one.metrics for one in run.iterations)]
    grouped, block = lines(shown), block_of(shown)
    found = [
        p for name, group in grouped.items() for metric in METRICS for p in points(name, group, metric, block)
    ]
    if not found:
        raise UserError("the logs hold no metrics to draw")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point.__annotations__)
        writer.writerows([getattr(p, column) for column in Point.__annotations__] for p in found)
    with style.applied():
        style.save(draw(grouped, found, block), folder / NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 0, or 2 after one line on stderr."""
    parser = Parser("python -m puzzle.plotting.curves", description="Draw training curves from run logs.")
    parser.add_argument("--logs", type=folder, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR")

    def run() -> None:
        options = parser.parse_args(arguments)
        loaded = load(options.logs)
        with whole(options.out) as folder:
            write(loaded.runs, folder)
        print(f"{NAME}.pdf .png .csv in {options.out}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
