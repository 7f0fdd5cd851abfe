"""`puzzle plan compare`: what runs took beside what is predicted for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from puzzle.cli import Parser, named, real
from puzzle.cli.plan_predict import other_dtype
from puzzle.cli.workloads import Measured, measured_runs, remapped
from puzzle.config import memory_report as footprint
from puzzle.plan.predict.calibration import Calibration, read_calibration
from puzzle.plan.predict.iteration import predict

COLUMNS = ("end to end", "generation", "inference", "training")
"""What a run is judged by. Switches are shown beside them."""


@dataclass(frozen=True)
class Row:
    """Seconds of a run by stage, and whether the calibration saw a run of the same settings."""

    run: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    calibrated_on: bool
    remark: str = ""

    def error(self, column: str) -> float:
        """How much more is predicted than was measured, as a share."""
        return self.predicted[column] / self.measured[column] - 1


def run(arguments: list[str]) -> int:
    """Print the table; 1 if a mean error is beyond the limit."""
    parser = Parser(
        prog="puzzle plan compare", description="Compare runs with their predictions, stage by stage."
    )
    parser.add_argument("runs", nargs="+", type=named, metavar="RUN", help="folders or logs of runs")
    parser.add_argument("--calibration", metavar="C", help="default: published-CLUSTER of each run's cluster")
    parser.add_argument(
        "--limit",
        type=real(0),
        metavar="X",
        help="most percent that any stage may be off in the mean, by calibration",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    groups: dict[str, list[Measured]] = {}
    for one in measured_runs(given.runs):
        groups.setdefault(given.calibration or f"published-{one.run.cluster}", []).append(one)
    rows = {name: compared(runs, read_calibration(name)) for name, runs in groups.items()}
    means = {name: mean_errors(found) for name, found in rows.items()}
    if given.json:
        listed = {name: [asdict(row) for row in found] for name, found in rows.items()}
        print(json.dumps({"runs": listed, "mean_absolute_errors": means}))
    else:
        print("\n\n".join(_table(name, found, means[name]) for name, found in rows.items()))
    worst = max((error for errors in means.values() for error in errors.values()), default=0.0)
    return int(given.limit is not None and 100 * worst > given.limit)


def _row(one: Measured, calibration: Calibration) -> Row:
    work = one.work
    if one.plan is not None:
        ranks = footprint.estimate(one.plan, one.plan.config.device != "cpu", calibration.memory_bytes)
        work = remapped(work, ranks, calibration.memory_bytes)
    seconds = predict(work, calibration.costs)
    predicted, measured = {"end to end": seconds.total}, {"end to end": one.end_to_end}
    for stage in ("generation", "inference", "training", "switch"):
        predicted[stage], measured[stage] = getattr(seconds, stage), getattr(one.seconds, stage)
    run = one.run
    # Ids of our own runs say nothing to people; their folders do, or the names of shipped logs.
    log = Path(run.source)
    own = log.parent.name if log.stem == "run" else log.stem
    name = run.run_id if run.provenance == "published" else own
    item = calibration.costs.item
    other = one.plan is not None and one.plan.itemsize != item
    remark = other_dtype(item, one.plan.itemsize) if other and one.plan is not None else ""
    return Row(name, predicted, measured, False, remark)


def compared(runs: Sequence[Measured], calibration: Calibration) -> list[Row]:
    """A row for every run."""
    seen = [one.work for one in runs if one.run.run_id in calibration.runs]
    rows = [_row(one, calibration) for one in runs]
    return [replace(row, calibrated_on=one.work in seen) for row, one in zip(rows, runs, strict=True)]


def mean_errors(rows: Sequence[Row]) -> dict[str, float]:
    """Mean absolute errors as shares, by column, over rows that were not calibrated on; of none, nothing."""
    held = [row for row in rows if not row.calibrated_on]
    return {column: fmean(abs(row.error(column)) for row in held) for column in COLUMNS} if held else {}


def _table(name: str, rows: Sequence[Row], means: Mapping[str, float]) -> str:
    width = max(len(row.run) for row in rows)
    lines = [f"{name}: seconds measured, and how far off is what was predicted (* calibrated on)"]
    lines.append(f"{'run':<{width}} " + "".join(f"{column:>17}" for column in (*COLUMNS, "switch")))
    for row in rows:
        cells = [f"{row.measured[column]:9.2f}{row.error(column):+8.1%}" for column in COLUMNS]
        if row.measured["switch"]:
            cells.append(f"{row.measured['switch']:9.3f}{row.predicted['switch']:8.3f}")
        lines.append(f"{row.run:<{width}} " + "".join(cells) + (" *" if row.calibrated_on else ""))
    held = sum(not row.calibrated_on for row in rows)
    shown = "".join(f"{value:17.1%}" for value in means.values())
    lines.append(f"{f'mean absolute, {held} runs not calibrated on':<{width}} {shown}")
    return "\n".join([*lines, *(f"{row.run}: {row.remark}" for row in rows if row.remark)])
