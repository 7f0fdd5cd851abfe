"""Figure 10's error bar, and how much scatter is no irregularity: by formulas written out once more."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.plotting import figure10, figure12
from puzzle.plotting.irregularities import CORRECTED, PUBLISHED
from puzzle.plotting.speedups import figure8
from puzzle.runlog import Run
from tests.plotting.builders import run

seconds = st.floats(0.5, 100.0)


def bulk(variant: str, training: tuple[float, ...], **changes: Any) -> Run:
    layouts = {"training": {"tp": 1, "pp": 8, "dp": 1}}
    fields = {"figures": ("figure10",), "layouts": layouts, "printed": {"training": training}}
    return run(variant, "7B/7B", run_id=f"{variant}-{changes.get('repeat', 0)}", **{**fields, **changes})


def bar(runs: list[Run]) -> Any:
    (row,) = [
        row
        for row in figure10.numbers(runs, PUBLISHED)
        if (row.series, row.unit, row.value is None) == ("PUZZLE", "1", False)
    ]
    return row


@given(st.lists(st.tuples(seconds, seconds), min_size=2, max_size=8))
def test_the_error_bar_is_the_largest_distance_from_the_last_ratio(pairs):
    without, with_sharing = zip(*pairs, strict=True)
    found = bar([bulk("wo_bulk", without), bulk("w_bulk", with_sharing)])
    ratios = np.array(without[1:]) / np.array(with_sharing[1:])
    assert found.spread == pytest.approx(np.abs(ratios[-1] - ratios).max(), abs=1e-12)
    assert found.value == pytest.approx(np.mean(without[1:]) / np.mean(with_sharing[1:]))


@pytest.mark.parametrize(
    ("without", "with_sharing", "spread"),
    [
        (
            (90.0, 6.0, 8.0, 9.0),
            (1.0, 4.0, 4.0, 4.0),
            0.75,
        ),  # largest at the first iteration behind the warm-up
        ((90.0, 8.0, 4.0, 8.0), (1.0, 4.0, 4.0, 4.0), 1.0),  # below the last
        ((90.0, 8.0, 16.0, 8.0), (1.0, 4.0, 4.0, 4.0), 2.0),  # above it
        ((90.0, 8.0, 12.0, 40.0), (1.0, 4.0, 4.0), 1.0),  # one log is longer: as far as both go
        ((90.0, 8.0, float("nan"), 12.0), (1.0, 4.0, 4.0, 4.0), 1.0),  # no time
        ((90.0, 8.0, 9.0, 12.0), (1.0, 4.0, 0.0, 4.0), 1.0),  # nothing to divide by
        ((90.0, 8.0), (1.0, 4.0), 0.0),
    ],
)
def test_the_error_bar_by_hand(without, with_sharing, spread):
    assert figure10.ratio_range(without, with_sharing) == pytest.approx(spread)


def test_without_an_iteration_behind_the_warm_up_there_is_no_error_bar():
    assert figure10.ratio_range((9.0,), (3.0,)) is None
    assert figure10.ratio_range((), ()) is None


def test_of_repeated_runs_the_error_bar_is_over_repeats():
    with_sharing = [(9.0, 4.0, 4.0), (9.0, 5.0, 5.0), (9.0, 6.0, 6.0)]
    runs = [bulk("wo_bulk", (9.0, 10.0, 20.0))]
    runs += [bulk("w_bulk", one, repeat=index) for index, one in enumerate(with_sharing)]
    found = bar(runs)
    assert (found.value, found.n) == (3.0, 3)
    assert found.spread == pytest.approx(3.0 * np.std([4, 5, 6], ddof=1) / 5)


def published(variant: str, e2e: float, figure: str = "figure8", **changes: Any) -> Run:
    """A run whose mean behind the warm-up is `e2e`; its warm-up says the contrary of what it should."""
    name = f"{figure}-{variant}-{e2e}"
    printed = {"e2e": (1000.0 / e2e, e2e - 0.5, e2e + 0.5), "generation": (1.0, e2e, e2e)}
    fields = {
        "printed": printed,
        "run_id": name,
        "source": f"{name}.log",
        "provenance": "published",
        "figures": (figure,),
    }
    return run(variant, **{**fields, **changes})


@pytest.mark.parametrize(
    ("faster", "said"), [(100.0, False), (99.0, False), (98.2, False), (97.8, True), (60.0, True)]
)
def test_baselines_nearer_than_two_percent_are_the_same(faster, said):
    """Two percent is what runs of the same settings scatter by."""
    runs = [published("dschat", 100.0), published("dschat", faster, "table3"), published("opt", 50.0)]
    (base, *_) = figure8.numbers(runs, PUBLISHED)
    assert base.logs == ("figure8-dschat-100.0.log",)
    assert [note.split(";")[0] for note in base.notes] == (
        ["baselines of this job differ among themselves"] * said
    )
    mended = {(row.series, row.unit): row for row in figure8.numbers(runs, CORRECTED)}
    drawn = faster if said else 100.0
    assert mended["DS-Chat", "s"].value == pytest.approx(drawn)
    assert mended["PUZZLE", "1"].value == pytest.approx(drawn / 50.0)
    assert any(note.startswith("corrected: the fastest") for note in mended["DS-Chat", "1"].notes) is said


def test_the_fastest_of_several_faster_baselines_is_taken():
    runs = [published("dschat", 100.0), published("opt", 50.0)]
    runs += [published("dschat", e2e, "table3", started=f"2024-04-{day}T00:00:00+00:00")
             for day, e2e in ((27, 80.0), (28, 70.0), (29, 90.0))]  # fmt: skip
    mended = {(row.series, row.unit): row for row in figure8.numbers(runs, CORRECTED)}
    assert mended["DS-Chat", "s"].value == pytest.approx(70.0)
    (note,) = mended["DS-Chat", "1"].notes
    assert "figure-dschat" not in note
    assert "table3-dschat-70.0.log (mean e2e 70 s in place of 100 s)" in note


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"global_batch_size": 64}},
        {"layouts": {"training": {"tp": 1, "pp": 4, "dp": 1}}},
        {"cluster": "phoenix"},
        {"provenance": "measured"},
        {"critic": "7B"},
    ],
)
def test_faster_baselines_of_other_jobs_do_not_count(other):
    runs = [published("dschat", 100.0), published("opt", 50.0), published("dschat", 60.0, "table3", **other)]
    assert figure8.numbers(runs, CORRECTED)[0].notes == ()
    assert {row.series: row.value for row in figure8.numbers(runs, CORRECTED) if row.unit == "s"} == {
        "DS-Chat": pytest.approx(100.0), "PUZZLE-Base": None, "PUZZLE": pytest.approx(50.0)
    }  # fmt: skip


def test_figure12_says_that_a_baseline_is_slow_and_draws_it():
    runs = [
        published("dschat", 100.0, "figure12"),
        published("dschat", 60.0, "table3"),
        published("opt", 50.0, "figure12"),
    ]
    for reading in (PUBLISHED, CORRECTED):
        first = figure12.numbers(runs, reading)[0]
        assert first.value == pytest.approx(100.0)
        assert any("the fastest: table3-dschat-60.0.log" in note for note in first.notes)


@pytest.mark.parametrize("times", [{"e2e": (9.0, 2.0, 2.0)}, {"reshard": (9.0, 2.0)}, {}])
def test_a_run_of_the_same_job_counts_where_it_has_the_times(times):
    """Of another figure, on the devices of the baseline; without the quantity there is nothing to put in."""
    layouts = {"training": {"tp": 1, "pp": 4, "dp": 1}}
    runs = [
        published("dschat", 100.0),
        published("opt", 50.0, layouts=layouts),
        published("opt", 40.0, "figure11", printed=times),
    ]
    rows = {(row.series, row.unit): row for row in figure8.numbers(runs, CORRECTED)}
    taken = "e2e" in times
    assert rows["PUZZLE", "s"].value == pytest.approx(2.0 if taken else 50.0)
    (note,) = rows["PUZZLE", "1"].notes
    assert note.startswith("corrected: one of the same job, figure11-opt-40.0.log") is taken
    assert "of different jobs (devices 4 and 8)" in note
