"""What is said beneath a figure about all of its numbers: only what holds of the runs that it draws."""

import math
from typing import Any

import pytest

from puzzle.plotting import figure10, figure12, table3
from puzzle.plotting.irregularities import CORRECTED, PUBLISHED
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog import Run
from puzzle.runlog.records import Simulation
from tests.plotting.builders import run

MODULES: dict[str, Any] = {
    "figure8": figure8, "figure9": figure9, "figure10": figure10, "figure11": figure11, "figure12": figure12,
    "table3": table3,
}  # fmt: skip
FIRST = {"figure9": "wo_bulk", "figure10": "wo_bulk", "figure11": "train_opt", "figure12": "dschat"}
ALL = ("e2e", "training", "generation", "inference", "experience", "gather", "reshard")
OF_PUBLISHED = {
    "figure9": "only the actor's optimizer step is inside the schedule",
    "figure10": "only the actor's optimizer step is inside the schedule",
    "figure11": "not the effect of the generation layout alone",
    "figure12": "Its training times are the lines of several ranks",
}


def drawn(name: str, provenance: str, times: tuple[float, ...] = (9.0, 2.0, 4.0), **changes: Any) -> Run:
    """A run of a figure; `times` of everything."""
    fields: dict[str, Any] = {"figures": (name,), "printed": dict.fromkeys(ALL, times), "cluster": provenance}
    fields |= {"run_id": provenance, "provenance": provenance}
    return run(FIRST.get(name, "opt"), "7B/7B", **{**fields, **changes})


def said(name: str, runs: list[Run], reading: str = PUBLISHED) -> str:
    module = MODULES[name]
    return " ".join(module.notes(module.numbers(runs, reading)))


@pytest.mark.parametrize("name", OF_PUBLISHED)
def test_what_is_known_of_published_runs_is_said_of_them_alone(name: str) -> None:
    """Wherever one stands among others; not of a log without numbers."""
    published, measured = drawn(name, "published"), drawn(name, "measured")
    empty = drawn(name, "published", ())
    for runs, holds in (
        ([published], True),
        ([published, measured], True),
        ([measured, published], True),
        ([measured], False),
        ([measured, empty], False),
    ):
        assert (OF_PUBLISHED[name] in said(name, runs)) is holds, runs


@pytest.mark.parametrize("name", ["figure8", "figure12", "table3"])
@pytest.mark.parametrize(
    ("repeats", "words"),
    [
        ((1,), "one standard deviation over iterations"),
        ((3,), "one standard deviation over repeats"),
        ((1, 3), "one standard deviation over iterations (over repeats where there are any)"),
        ((1, 1), "one standard deviation over iterations"),
        ((2, 3), "one standard deviation over repeats"),
    ],
)
def test_what_a_spread_is_over_is_said(name: str, repeats: tuple[int, ...], words: str) -> None:
    runs = [
        drawn(name, "measured", cluster=f"cluster {index}", repeat=repeat, source=f"{index}-{repeat}")
        for index, count in enumerate(repeats)
        for repeat in range(count)
    ]
    text = said(name, runs)
    assert words in text
    assert ("repeats" in words) is ("over repeats" in text)


def test_a_run_without_spread_says_nothing_of_spreads() -> None:
    one = drawn("table3", "measured", (9.0, 2.0))
    assert table3.numbers([one], PUBLISHED)[0].spread is None
    assert "over iterations" in said("table3", [one])


def test_a_gather_shown_twice_is_said_of_ds_chat() -> None:
    """Where it is shown: not where it was mended, was not timed, or no DS-Chat is drawn."""
    twice = "DS-Chat's gather is part of its generation time"
    measured = drawn("figure12", "measured")
    assert twice in said("figure12", [measured])
    assert "lines of several ranks" not in said("figure12", [measured])
    assert twice not in said("figure12", [measured], CORRECTED)
    untimed = {key: (9.0, 2.0, 4.0) for key in ALL if key != "gather"}
    assert twice not in said("figure12", [drawn("figure12", "measured", printed=untimed)])
    assert twice not in said("figure12", [run("opt", figures=("figure12",), printed=measured.printed)])


def test_where_theory_comes_from_is_said() -> None:
    """Published constants, formulas in their place, or simulations with costs of the run."""
    simulated = Simulation(1, "training", {"apart": 3.0, "fused": 2.0})
    published = [drawn("figure10", "published")]
    measured = [drawn("figure10", "measured", records=(simulated,))]
    constants, formula = "theoretical values are constants", "the formula is for two models of equal cost"
    costs = "by costs that the run without ts measured"
    for runs, reading, expected in (
        (published, PUBLISHED, [constants]),
        (published, CORRECTED, [formula]),
        (measured, PUBLISHED, [costs]),
        (measured, CORRECTED, [costs]),
        ([*published, *measured], PUBLISHED, [constants, costs]),
        ([*published, *measured], CORRECTED, [formula, costs]),
    ):
        text = said("figure10", runs, reading)
        assert [words for words in (constants, formula, costs) if words in text] == expected


@pytest.mark.parametrize(
    ("seconds", "ratio"),
    [
        ({"apart": 3.0, "fused": 2.0}, 1.5),
        ({"apart": 2.0, "fused": 4.0}, 0.5),
        ({"apart": 3.0}, None),
        ({"fused": 3.0}, None),
        ({"apart": 3.0, "fused": 0.0}, None),
        ({"apart": math.nan, "fused": 2.0}, None),
    ],
)
def test_theory_by_simulation_is_apart_over_fused(seconds: dict[str, float], ratio: float | None) -> None:
    one = drawn("figure10", "measured", records=(Simulation(1, "training", seconds),))
    assert figure10.simulated_speedup(one) == ratio
