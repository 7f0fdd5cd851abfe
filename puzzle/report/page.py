"""A report as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from puzzle.errors import UserError
from puzzle.report.charts import Line, chart
from puzzle.report.facts import Facts, differing
from puzzle.runlog import load_runs
from puzzle.runlog.records import Evaluation, readable

FIRST = {
    "reward": "reward",
    "held out reward": "held-out reward, 95 % interval over prompts",
    "held out loss": "held-out loss",
    "held out accuracy": "held-out accuracy",
    "kl": "KL to the reference, nats per token",
    "actor_loss": "actor loss",
    "critic_loss": "critic loss",
    "explained_variance": "variance of returns that values explain",
    "entropy": "entropy, nats",
    "response_length": "tokens of a response",
    "truncated_frac": "responses cut at the limit",
    "repetition": "repeated token pairs",
    "actor_grad_norm": "gradient norm of the actor",
    "logprob_gap_rms": "generation to training, rms nats",
    "seconds": "seconds of an iteration",
    "tokens_per_device_second": "tokens per second and device",
}
"""Curves that are shown at once, with their headings; other metrics come behind them."""
HELD_OUT = "held out "
"""Before the name of a metric: as evaluations have it."""
COLOURS = 8
MOST_NAMED = 3
"""Runs that a page's title names; of more it says how many."""
LONGEST_TEXT = 2000
"""Characters of a prompt or response; longer ones lose their middle."""
GIB = 1 << 30
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Curve:
    """A heading and its chart."""

    heading: str
    svg: Markup


def facts_of(folders: Sequence[Path]) -> list[Facts]:
    """The runs in `folders`, each called by what tells its path from the others'.

    UserError for a folder that holds none, and where two are one run.
    """
    runs = [run for folder in folders for run in load_runs(folder).runs]
    logs = [Path(run.source).resolve() for run in runs]
    places = [log.parent if log.name == "run.jsonl" else log.with_suffix("") for log in logs]
    if len(set(places)) < len(places):
        raise UserError("the same run is given twice; name each folder once")
    labels = _labels(places)
    return [Facts(label, log.parent, run) for label, log, run in zip(labels, logs, runs, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that differ."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def html(runs: Sequence[Facts], beside: Path) -> str:
    """The page, whose links are relative to the folder `beside`, where it will lie."""
    return _rendered("page.html.j2", runs, beside, autoescape=True)


def markdown(runs: Sequence[Facts], beside: Path) -> str:
    """The same without curves."""
    return _rendered("page.md.j2", runs, beside, autoescape=False)


def _rendered(name: str, runs: Sequence[Facts], beside: Path, autoescape: bool) -> str:
    environment = Environment(
        loader=PackageLoader("puzzle.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "quantity": _quantity,
        "percent": lambda value: "" if value is None else f"{100 * value:.1f} %",
        "memory": lambda value: "" if value is None else f"{value / scale:.2f}",
        "shown": shown,
        "text": _short,
        "cell": _cell,
    }
    scale, unit = _memory_unit(runs)
    differences = differing(runs) if len(runs) > 1 else {}
    return environment.get_template(name).render(
        runs=runs,
        title=_title([facts.label for facts in runs]),
        summary=summary(runs),
        curves=curves(runs, FIRST) if autoescape else [],
        more=curves(runs, _others(runs)) if autoescape else [],
        differences=differences,
        unit=unit,
        link=lambda path: os.path.relpath(path, beside).replace(os.sep, "/"),
        colours=COLOURS,
        longest=max((facts.seconds or 0.0 for facts in runs), default=0.0),
    )


def _memory_unit(runs: Sequence[Facts]) -> tuple[int, str]:
    """What memory is written in: GiB, or MiB where all of it is less."""
    sizes = [size for facts in runs for one in facts.memory for size in (one.formula, one.measured) if size]
    return (GIB, "GiB") if max(sizes, default=GIB) >= GIB // 8 else (1 << 20, "MiB")


def _title(labels: Sequence[str]) -> str:
    if len(labels) > MOST_NAMED:
        return f"{len(labels)} runs"
    return " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))


def summary(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Rows of the table that comes first: what it is, and each run's."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, values: Sequence[Any]) -> None:
        if any(value not in (None, "") for value in values):
            rows.append((name, ["" if value is None else str(value) for value in values]))

    row("ended", [facts.status for facts in runs])
    row("began", [_clock(facts.run.started) for facts in runs])
    row("models", [facts.run.pair for facts in runs])
    row("provenance", [facts.run.provenance for facts in runs])
    row("device", [_device(facts) for facts in runs])
    row("layout of training", [_layout(facts, "training") for facts in runs])
    row("layout of generation", [_layout(facts, "generation") for facts in runs])
    row("iterations", [_iterations(facts) for facts in runs])
    row("reward, first to last", [_ends(facts.series("reward")) for facts in runs])
    row("loss, first to last", [_ends(_loss(facts)) for facts in runs])
    for name in ("reward", "loss", "accuracy"):
        row(f"held-out {name}, before to after", [_ends(_held_out(facts, name)) for facts in runs])
    row("seconds of an iteration", [_number(facts.seconds) for facts in runs])
    row("tokens per second and device", [_number(f.mean("tokens_per_device_second")) for f in runs])
    row("warnings", [len(facts.warnings) or None for facts in runs])
    row("restarts", [len(facts.restarts) or None for facts in runs])
    row("commit", [_commit(facts.run.git_commit) for facts in runs])
    return rows


def curves(runs: Sequence[Facts], names: dict[str, str]) -> list[Curve]:
    """A chart for each name that any run has, all runs in it."""
    found = []
    for name, heading in names.items():
        lines = [_line(facts, name, number % COLOURS) for number, facts in enumerate(runs)]
        svg = chart(lines, f"{heading} over iterations")
        if svg is not None:
            found.append(Curve(heading, Markup(svg)))
    return found


def _others(runs: Sequence[Facts]) -> dict[str, str]:
    names = dict.fromkeys(name for facts in runs for name in facts.metrics)
    return {name: name for name in names if name not in FIRST}


def _line(facts: Facts, name: str, colour: int) -> Line:
    if name == "seconds":
        points = [(float(one.iteration), one.e2e_seconds) for one in facts.run.iterations]
        return Line(facts.label, points, colour)
    if name.startswith(HELD_OUT):
        name = name.removeprefix(HELD_OUT)
        spread = [one.metrics.get(f"{name}_ci95", 0.0) for one in _evaluations(facts, name)]
        return Line(facts.label, _held_out(facts, name), colour, spread if any(spread) else ())
    return Line(facts.label, facts.series(name), colour)


def _held_out(facts: Facts, name: str) -> list[tuple[float, float]]:
    return [(float(one.iteration), one.metrics[name]) for one in _evaluations(facts, name)]


def _evaluations(facts: Facts, name: str) -> list[Evaluation]:
    """Those that have the metric."""
    return [one for one in facts.run.evaluations if name in one.metrics]


def _loss(facts: Facts) -> list[tuple[float, float]]:
    """Of the model that learns from examples; nothing where a policy learns from rewards."""
    return [] if facts.series("reward") else facts.series("actor_loss") or facts.series("reward_loss")


def _ends(points: Sequence[tuple[float, float]]) -> str | None:
    """The first and the last value."""
    if len(points) < 2:
        return _number(points[0][1]) if points else None
    return f"{_number(points[0][1])} to {_number(points[-1][1])}"


def _commit(commit: str | None) -> str | None:
    """In twelve digits, with the mark of a checkout that differed from it."""
    return None if commit is None else commit[:12] + "+" * commit.endswith("+")


def _clock(started: str | None) -> str | None:
    """A time of the log for reading, UTC where it is that."""
    return None if started is None else started.replace("T", " ", 1).replace("+00:00", " UTC")


def _iterations(facts: Facts) -> str:
    done, planned = len(facts.run.iterations), facts.run.config.get("iterations")
    return str(done) if planned is None else f"{done} of {planned}"


def _device(facts: Facts) -> str | None:
    hardware = facts.run.hardware
    if "device" not in hardware:
        return None
    return f"{hardware.get('processes', 1)} x {hardware['device']}"


def _layout(facts: Facts, stage: str) -> str | None:
    cut = facts.run.layouts.get(stage)
    if not isinstance(cut, dict):
        return None
    return ", ".join(f"{axis} {cut[axis]}" for axis in ("tp", "pp", "dp") if axis in cut)


def _number(value: float | None) -> str:
    return "" if value is None else readable(value)


def _quantity(value: float, name: str) -> str:
    """A number of a record by its name there: bytes in units of thousands."""
    if "bytes" not in name:
        return _number(value)
    power = min(int(math.log10(value) // 3), len(UNITS) - 1) if value >= 1 else 0
    return f"{_number(value / 1000**power)} {UNITS[power]}"


def shown(value: Any) -> str:
    """A setting as a configuration would have it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-80:]}"


def _short(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} [...] {text[-LONGEST_TEXT // 2 :]}"


def _cell(text: Any) -> str:
    """What a cell of a Markdown table may hold: one line, no bars."""
    return " ".join(_short(str(text)).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
