"""From runs to rows: means, spreads, repeats, panels, gaps."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plotting import figure10, figure12, table3
from puzzle.plotting.irregularities import CORRECTED, PUBLISHED
from puzzle.plotting.selection import Pool, agree
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.plotting.stats import mean, of
from puzzle.runlog import RunWriter, load_runs
from puzzle.runlog.records import Iteration
from tests.plotting.builders import run
from tests.plotting.figure_rows import rows_of, series
from tests.runlog import texts


@given(series)
def test_mean_of_one_run(values):
    found = mean(Pool((run(printed={"e2e": tuple(values)}),)), of("e2e"))
    assert found.value == pytest.approx(np.mean(values[1:]))
    assert found.spread == pytest.approx(np.std(values[1:], ddof=1), abs=1e-9)
    assert found.n == len(values) - 1


@given(st.lists(series, min_size=2, max_size=5))
def test_mean_of_repeats(repeats):
    pool = Pool(tuple(run(repeat=i, printed={"e2e": tuple(one)}) for i, one in enumerate(repeats)))
    means = [np.mean(one[1:]) for one in repeats]
    found = mean(pool, of("e2e"))
    assert found.value == pytest.approx(np.mean(means))
    assert found.spread == pytest.approx(np.std(means, ddof=1), abs=1e-9)
    assert found.n == len(repeats)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_values_that_are_no_times_are_left_out_and_said(bad):
    found = mean(Pool((run(printed={"e2e": (9.0, 2.0, bad, 4.0)}),)), of("e2e"))
    assert (found.value, found.n) == (3.0, 2)
    assert "1 of 3 values are no times" in found.notes[0]


@pytest.mark.parametrize("printed", [{}, {"e2e": ()}, {"e2e": (9.0,)}, {"e2e": (9.0, math.nan)}])
def test_without_values_there_is_a_gap(printed):
    rows = rows_of(figure8, [run("dschat"), run("base"), run("opt", printed=printed)])
    row = rows["orion", "7B/350M", "PUZZLE", "1"]
    assert (row.value, row.n, row.gap) == (None, 0, "no values")


def test_speedups_with_their_spread():
    runs = [run("dschat", printed={"e2e": (50.0, 10.0, 14.0)}), run("opt")]
    rows = rows_of(figure8, runs)
    row = rows["orion", "7B/350M", "PUZZLE", "1"]
    assert (row.value, row.n) == (4.0, 2)
    assert row.spread == pytest.approx(4 * np.std([2, 4], ddof=1) / 3)
    assert rows["orion", "7B/350M", "DS-Chat", "1"].value == 1
    assert rows["orion", "7B/350M", "PUZZLE", "s"].value == 3
    assert rows["orion", "7B/350M", "PUZZLE-Base", "1"].gap == "no log"


def test_without_a_baseline_every_bar_is_a_gap():
    rows = rows_of(figure8, [run("base"), run("opt")])
    assert [row.gap for row in rows.values() if row.unit == "1"] == ["no log", "no baseline", "no baseline"]
    assert [row.value for row in rows.values() if row.unit == "s"] == [None, 3, 3]


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ({"e2e": (9.0, 2.0, 4.0)}, True),
        ({"e2e": (9.0, 2.0, 4.0), "training": (1.0,)}, True),  # one may print more
        ({"e2e": (9.0, 2.0, 4.0 * (1 + 1e-12))}, True),
        ({"e2e": (9.0, 2.0, 4.1)}, False),
        ({"e2e": (9.0, 2.0)}, False),
        ({"e2e": (9.0, 2.0, 4.0, 5.0)}, False),
        ({"training": (9.0, 2.0, 4.0)}, False),  # nothing to tell by
    ],
)
def test_logs_of_one_run_print_the_same(printed, same):
    assert agree(run(), run(printed=printed)) is same
    assert agree(run(printed=printed), run()) is same


def test_clusters_and_pairs_come_from_the_runs_in_order_of_size():
    pairs = ["33B/7B", "7B/7B", "13B/350M", "7B/350M", "tiny/tiny"]
    runs = [run("opt", pair, cluster=cluster) for pair in pairs for cluster in ("new", "orion")]
    rows = figure8.numbers(runs, PUBLISHED)
    ordered = list(dict.fromkeys((row.cluster, row.config) for row in rows))
    sizes = ["tiny/tiny", "7B/350M", "13B/350M", "7B/7B", "33B/7B"]
    assert ordered == [(cluster, pair) for cluster in ("new", "orion") for pair in sizes]


def test_the_table_goes_by_the_actor_whose_weights_move():
    pairs = ["33B/7B", "13B/350M", "7B/7B", "7B/350M"]
    rows = table3.numbers([run("opt", pair, figures=("table3",)) for pair in pairs], PUBLISHED)
    assert list(dict.fromkeys(row.config for row in rows)) == ["7B/350M", "7B/7B", "13B/350M", "33B/7B"]


def test_each_provenance_has_panels_of_its_own():
    kinds = ("measured", "published", "simulated", "rehearsal")
    runs = [run("opt", run_id=kind, provenance=kind) for kind in kinds]
    rows = figure8.numbers([*runs, run("opt", cluster="cpu", provenance="rehearsal")], PUBLISHED)
    assert {(row.cluster, row.provenance) for row in rows} == {
        ("orion (measured)", "measured"),
        ("orion (published)", "published"),
        ("orion (simulated)", "simulated"),
        ("orion (rehearsal)", "rehearsal"),
        ("cpu (rehearsal)", "rehearsal"),
    }
    assert {row.cluster for row in figure8.numbers([runs[0]], PUBLISHED)} == {"orion"}


def test_runs_of_other_figures_are_not_drawn():
    assert figure8.numbers([run("opt", figures=("figure11",))], PUBLISHED) == []
    assert figure8.numbers([run("w_bulk")], PUBLISHED) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"repeat": 1, "layouts": {"training": {"tp": 8, "pp": 1, "dp": 1}}},
        {"repeat": 1, "config": {"global_batch_size": 64}},
        {"printed": {"e2e": (9.0, 2.0, 5.0)}},
    ],
)
def test_runs_that_disagree_are_refused(changes):
    with pytest.raises(UserError, match=r"7B/350M-opt\.jsonl and second\.jsonl"):
        figure8.numbers([run("opt"), run("opt", source="second.jsonl", **changes)], PUBLISHED)


def test_other_jobs_are_named():
    small = run("opt", config={"global_batch_size": 64})
    row = rows_of(figure8, [run("dschat"), small])["orion", "7B/350M", "PUZZLE", "1"]
    assert "different jobs (global batch 64 and 128)" in row.notes[0]


def bulk(variant, training, layout=(1, 8, 2), **changes):
    tp, pp, dp = layout
    fields = {
        "figures": ("figure9", "figure10"),
        "layouts": {"training": {"tp": tp, "pp": pp, "dp": dp}},
        "printed": {"training": training},
    }
    return run(variant, "7B/7B", **{**fields, **changes})


def test_figure9_and_10_read_the_training_stage():
    runs = [bulk("wo_bulk", (9.0, 6.0, 8.0, 7.0)), bulk("w_bulk", (9.0, 5.0, 5.0, 4.0))]
    assert rows_of(figure9, runs)["orion", "7B/7B", "PUZZLE w/ ts", "1"].value == pytest.approx(21 / 14)
    rows = rows_of(figure10, runs)
    row = rows["orion", "7B/7B bs128 (8,2,1)", "PUZZLE", "1"]
    assert row.value == pytest.approx(21 / 14)
    assert row.spread == pytest.approx(max(7 / 4 - 6 / 5, 7 / 4 - 8 / 5))
    assert rows["orion", "7B/7B bs128 (8,2,1)", "Theoretical", "1"].gap == "no theory"


def test_figure10_orders_layouts_as_published():
    layouts = [(4, 4, 1), (1, 8, 2), (2, 8, 1), (1, 16, 1)]
    runs = [bulk("w_bulk", (1.0, 1.0), layout, run_id=str(layout)) for layout in layouts]
    rows = [row for row in figure10.numbers(runs, PUBLISHED) if row.series == "PUZZLE"]
    assert [row.config[-8:].strip() for row in rows] == ["(16,1,1)", "(8,1,2)", "(4,1,4)", "(8,2,1)"]


def test_simulated_theory_stands_beside_measured_runs():
    theory = bulk("theoretical", (), provenance="simulated", printed={"training_speedup": (1.25,)})
    runs = [bulk("wo_bulk", (9.0, 6.0)), bulk("w_bulk", (9.0, 5.0)), theory]
    rows = rows_of(figure10, runs)
    row = rows["orion", "7B/7B bs128 (8,2,1)", "Theoretical", "1"]
    assert (row.value, row.n, row.spread) == (1.25, 0, None)
    assert {key[0] for key in rows} == {"orion"}
    alone = rows_of(figure10, [theory])
    assert alone["orion (simulated)", "7B/7B bs128 (8,2,1)", "PUZZLE", "1"].gap == "no log"
    other = rows_of(
        figure10, [*runs[:2], bulk("theoretical", (), provenance="published", printed=theory.printed)]
    )
    assert other["orion (measured)", "7B/7B bs128 (8,2,1)", "Theoretical", "1"].gap == "no theory"


def staged(variant, pair="7B/7B", **printed):
    return run(variant, pair, figures=("figure12", "table3"), printed=printed)


STAGED = (
    staged(
        "dschat", generation=(9.0, 5.0), experience=(9.0, 8.0), training=(4.0, 4.0, 6.0), gather=(1.0, 2.0)
    ),
    staged("base", generation=(9.0, 4.0), inference=(9.0, 2.0), training=(9.0, 3.0)),
    staged(
        "opt", generation=(9.0, 3.0, 4.0), inference=(9.0, 1.0), training=(9.0, 2.0), reshard=(1.0, 0.5, 0.7)
    ),
)


def test_figure12_and_table3():
    rows = {key[1:3]: row.value for key, row in rows_of(figure12, STAGED).items()}
    found = [
        [rows[system, label] for label in figure12.LABELS] for system in ("DSChat", "PUZZLE-Base", "PUZZLE")
    ]
    assert found == [[5, 3, 5, 2], [4, 2, 3, 0], [pytest.approx(2.9), 1, 2, 0.6]]
    cells = rows_of(table3, STAGED)
    assert cells["orion", "7B/7B", "PUZZLE", "s"].value == 0.6
    assert cells["orion", "7B/7B", "DS-Chat", "s"].value == 2


def test_figure12_without_a_base_run_has_a_gap_not_a_zero():
    rows = rows_of(figure12, [STAGED[0], STAGED[2]])
    assert rows["orion", "PUZZLE-Base", "Comm.", "s"].value is None


@pytest.mark.parametrize("reading", [PUBLISHED, CORRECTED])
def test_a_gather_that_was_not_timed_is_a_gap_and_not_0_s(tmp_path, reading):
    """ZeRO-3 without the Hybrid Engine gathers inside generation, where nobody times it."""
    for variant, switch in (("dschat", 0.0), ("opt", 0.25)):
        header = texts.header(run_id=variant, variant=variant, figures=("figure12", "table3"))
        with RunWriter(tmp_path / variant, header) as writer:
            for index in range(3):
                stages, e2e = texts.stages(2.0, 0.5, 1.0, switch)
                writer.write(Iteration(index, stages, e2e, {}))
    runs = load_runs(tmp_path).runs
    assert {run.variant: "gather" in run.printed for run in runs} == {"dschat": False, "opt": False}
    cells = {row.series: row for row in table3.numbers(runs, reading)}
    assert (cells["DS-Chat"].value, cells["DS-Chat"].n, cells["DS-Chat"].gap) == (None, 0, "not timed")
    assert cells["PUZZLE"].value == 0.25
    stages = {(row.config, row.series): row for row in figure12.numbers(runs, reading)}
    assert [stages["DSChat", label].value for label in figure12.LABELS] == [2.0, 0.5, 1.0, None]
    assert stages["DSChat", figure12.LABELS[3]].gap == "not timed"
    assert not any("gather" in note for note in figure12.notes(list(stages.values())))


def test_a_system_that_generates_where_it_trains_communicates_nothing():
    layout = {"tp": 1, "pp": 1, "dp": 1}
    one = staged("opt", generation=(9.0, 3.0), inference=(9.0, 1.0), training=(9.0, 2.0))
    one = replace(one, layouts={"training": layout, "generation": layout})
    rows = {row.series: row.value for row in figure12.numbers([one], PUBLISHED) if row.config == "PUZZLE"}
    assert list(rows.values()) == [3.0, 1.0, 2.0, 0.0]


def test_figure12_with_several_pairs_names_them():
    rows = rows_of(figure12, [*STAGED, staged("base", "13B/7B", generation=(1.0, 1.0))])
    assert ("orion", "13B/7B PUZZLE-Base", "Stage1 (Gen.)", "s") in rows
    assert ("orion", "7B/7B PUZZLE-Base", "Stage1 (Gen.)", "s") in rows


def test_figure11_is_relative_to_train_opt():
    runs = [
        run(variant, figures=("figure11",), printed={"e2e": (9.0, time)})
        for variant, time in (("train_opt", 6.0), ("gen_opt", 5.0), ("opt", 4.0))
    ]
    values = [row.value for row in figure11.numbers(runs, PUBLISHED) if row.unit == "1"]
    assert values == [1.0, 1.2, 1.5]
