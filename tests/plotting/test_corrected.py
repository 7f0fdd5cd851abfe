"""The corrected reading: its numbers written out from the logs once more, and that it says what it did."""

from statistics import fmean

import pytest

from puzzle.plotting import figure10, figure12, table3
from puzzle.plotting.irregularities import CORRECTED, PUBLISHED
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog import load_runs
from tests.plotting import builders

RUNS = load_runs(builders.PUBLISHED).runs
BY_ID = {run.run_id: run for run in RUNS}


def late(run_id, quantity):
    return fmean(BY_ID[run_id].printed[quantity][1:])


def changed(figure):
    """Corrected rows, and those of them whose value is not the published one."""
    old = {(row.cluster, row.config, row.series, row.unit): row for row in figure.numbers(RUNS, PUBLISHED)}
    new = {(row.cluster, row.config, row.series, row.unit): row for row in figure.numbers(RUNS, CORRECTED)}
    assert list(old) == list(new)
    return new, {key for key, row in new.items() if row.value != old[key].value}


def test_figure8_takes_the_run_with_resharding_and_the_fastest_baselines():
    rows, different = changed(figure8)
    fastest = late("table3/orion/7b_7b_dschat", "e2e")
    assert rows["orion", "33B/7B", "PUZZLE", "1"].value == pytest.approx(
        late("figure8/orion/33b_7b_dschat", "e2e") / late("figure11/orion/33b_7b_opt", "e2e"), rel=1e-12
    )
    assert rows["orion", "33B/7B", "PUZZLE", "1"].value == pytest.approx(2.66, abs=0.005)
    assert rows["orion", "7B/7B", "PUZZLE", "1"].value == pytest.approx(
        fastest / late("figure8/orion/7b_7b_opt", "e2e"), rel=1e-12
    )
    assert {key[1] for key in different if key[3] == "1"} == {"33B/7B", "7B/7B", "13B/350M"}
    assert {key[0] for key in different} == {"orion"}
    said = [note for row in rows.values() for note in row.notes]
    assert sum(note.startswith("corrected: ") for note in said) == len(said) == 3


def test_table3_takes_unaltered_times():
    rows, different = changed(table3)
    assert rows["orion", "13B/350M", "PUZZLE", "s"].value == late("figure8/orion/13b_350m_opt", "reshard")
    assert rows["orion", "33B/7B", "PUZZLE", "s"].value == late("figure11/orion/33b_7b_opt", "reshard")
    assert rows["orion", "7B/7B", "PUZZLE", "s"].value == late("figure11/orion/7b_7b_opt", "reshard")
    assert {key[:3] for key in different} == {
        ("orion", pair, "PUZZLE") for pair in ("13B/350M", "33B/7B", "7B/7B")
    }
    for key in different:
        assert any(note.startswith("corrected: ") for note in rows[key].notes)


@pytest.mark.parametrize("cluster", ["orion", "phoenix"])
def test_figure12_counts_the_gather_once_and_no_line_of_the_warm_up(cluster):
    rows, different = changed(figure12)
    base = f"figure12/{cluster}/7b_7b_dschat"
    both = zip(BY_ID[base].printed["generation"], BY_ID[base].printed["gather"], strict=False)
    generation = fmean([whole - gather for whole, gather in both][1:])
    assert rows[cluster, "DSChat", "Stage1 (Gen.)", "s"].value == pytest.approx(generation, rel=1e-12)
    training = [one.stage_seconds["training"] for one in BY_ID[base].iterations[1:]]
    assert rows[cluster, "DSChat", "Stage3 (Train.)", "s"].value == pytest.approx(fmean(training), rel=1e-12)
    assert {key[1:3] for key in different} <= {("DSChat", "Stage1 (Gen.)"), ("DSChat", "Stage3 (Train.)")}


def test_figure10_replaces_constants_where_both_models_cost_the_same():
    rows, different = changed(figure10)
    assert rows["orion", "7B/7B bs128 (16,1,1)", "Theoretical", "1"].value == 2 * (32 + 15) / (64 + 15)
    assert rows["orion", "7B/7B bs256 (8,2,1)", "Theoretical", "1"].value == 2 * (32 + 7) / (64 + 7)
    assert {key[1].split()[0] for key in different} == {"7B/7B"}
    assert {key[2] for key in different} == {"Theoretical"}
    assert rows["orion", "13B/7B bs64 (8,2,1)", "Theoretical", "1"].value == 1.346531


@pytest.mark.parametrize("figure", [figure9, figure11])
def test_the_others_have_nothing_to_mend(figure):
    assert changed(figure)[1] == set()


def test_nothing_is_said_of_runs_of_ours():
    ours = [
        builders.run("opt", layouts={"training": {"tp": 1}, "generation": {"tp": 1}}),
        builders.run("dschat", source="a/run.jsonl"),
        builders.run("dschat", source="b/run.jsonl", figures=("table3",), printed={"e2e": (9.0, 1.0, 1.0)}),
    ]
    assert [row.notes for row in figure8.numbers(ours, PUBLISHED)] == [()] * 6
