"""Claims of docs/planner.md: what is predicted for this engine's runs beside what they took."""

from __future__ import annotations

from functools import cache

from claims.claim import Claim
from claims.logs import ROOT
from puzzle.cli.plan_compare import COLUMNS, Row, compared, mean_errors
from puzzle.cli.workloads import measured_runs
from puzzle.plan.predict.calibration import read_calibration

PAGE = "docs/planner.md"
ONE = {
    "1.3B/350M, nothing shared": "campaign/1xh200/1.3b_350m_base_16_1-1-1.jsonl",
    "1.3B/350M, shared pipelines": "campaign/1xh200/1.3b_350m_opt_16_1-1-1.jsonl",
    "350M/350M, nothing shared": "campaign/1xh200/350m_350m_base_16_1-1-1.jsonl",
    "350M/350M, shared pipelines": "campaign/1xh200/350m_350m_opt_16_1-1-1.jsonl",
    "7B cut to 8 layers/350M": "bench/2026-12-01-1xh200-tiles/first-before",
}
FOUR = ("baseline/4xh200", "baseline/4xh200-search")


@cache
def _rows(*paths: str) -> list[Row]:
    return compared(measured_runs([ROOT / "logs" / path for path in paths]), read_calibration("h200"))


def _row(path: str) -> list[float]:
    (row,) = _rows(path)
    return [seconds for column in COLUMNS for seconds in (row.measured[column], row.predicted[column])]


def _means(*paths: str) -> list[float]:
    return [100 * share for share in mean_errors(_rows(*paths)).values()]


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
            lambda: _means(*ONE.values()),
        ),
        Claim(
            PAGE,
            "lie {:.0f} % from what `h200` predicts in the mean end to end, generation {:.0f} %,"
            " inference {:.0f} %, training {:.0f} %",
            lambda: _means(*FOUR),
        ),
    ]
