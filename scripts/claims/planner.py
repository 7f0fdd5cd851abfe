"""Claims of docs/planner.md: what is predicted for this engine's runs beside what they took."""

from __future__ import annotations

from functools import cache

from claims.claim import Claim
from claims.logs import ROOT
from puzzle.cli.plan_compare import COLUMNS, Row, compared, mean_errors
from puzzle.cli.workloads import measured_runs
from puzzle.plan.predict.calibration import read_calibration

PAGE = "docs/planner.md"
RUNS = "campaign/1xh200/{}_16_1-1-1.jsonl"
ONE = {
    "1.3B/350M, nothing shared": RUNS.format("1.3b_350m_base"),
    "1.3B/350M, one decode micro-batch": RUNS.format("1.3b_350m_large_decode"),
    "1.3B/350M, shared pipelines": RUNS.format("1.3b_350m_opt"),
    "350M/350M, nothing shared": RUNS.format("350m_350m_base"),
    "350M/350M, shared pipelines": RUNS.format("350m_350m_opt"),
    "7B cut to 30 layers/350M, nothing shared": RUNS.format("7b-30l_350m_base"),
    "7B cut to 30 layers/350M, shared pipelines": RUNS.format("7b-30l_350m_opt"),
    "7B cut to 8 layers/350M": "bench/2026-12-01-1xh200-tiles/first-before",
}
FOUR = ("baseline/4xh200", "baseline/4xh200-search")


@cache
def _rows(calibration: str, *paths: str) -> list[Row]:
    return compared(measured_runs([ROOT / "logs" / path for path in paths]), read_calibration(calibration))


def _row(path: str) -> list[float]:
    (row,) = _rows("h200-measured", path)
    return [seconds for column in COLUMNS for seconds in (row.measured[column], row.predicted[column])]


def _means(calibration: str, *paths: str) -> list[float]:
    return [100 * share for share in mean_errors(_rows(calibration, *paths)).values()]


def planner_page() -> list[Claim]:
    """Iterations on one GPU, and on four."""
    form = "| {} | " + " | ".join(["{:.2f}"] * 2 * len(COLUMNS)) + " |"
    return [
        *(
            Claim(PAGE, form.replace("{}", name, 1), lambda path=path: _row(path))
            for name, path in ONE.items()
        ),
        Claim(
            PAGE,
            "mean absolute error of {:.0f} % end to end, {:.0f} % of generation, {:.0f} % of inference"
            " and {:.0f} % of training",
            lambda: _means("h200-measured", *ONE.values()),
        ),
        Claim(
            PAGE,
            "The data sheet `h200` is {:.0f} % off end to end, {:.0f} % in generation, {:.0f} % in inference"
            " and {:.0f} % in training",
            lambda: _means("h200", *ONE.values()),
        ),
        Claim(
            PAGE,
            "lie {:.0f} % from what `h200` predicts in the mean end to end, generation {:.0f} %,"
            " inference {:.0f} %, training {:.0f} %",
            lambda: _means("h200", *FOUR),
        ),
    ]
