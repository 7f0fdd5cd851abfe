"""Which runs of several settings figures draw, and what they say of the others."""

from dataclasses import replace

from puzzle.plotting import __main__ as page
from puzzle.plotting import ablation, figure10, figure12, table3
from puzzle.plotting.speedups import figure8, figure9, figure11
from puzzle.runlog import UNFAITHFUL, Report
from puzzle.runlog.records import GAP, End, Note, Simulation
from tests.plotting import builders
from tests.plotting.builders import run
from tests.plotting.figure_rows import rows_of


def chat(seconds, **told):
    engine = {"actor_zero_stage": 3, "enable_hybrid_engine": True, "hybrid_engine_engaged": True, **told}
    config = {"global_batch_size": 128, "deepspeed": engine, "algorithm": {"microbatch": 4}}
    return run("dschat", config=config, printed={"e2e": (1.0, seconds, seconds)}, source=f"{seconds}.jsonl")


def test_the_fastest_setting_of_a_baseline_is_drawn_and_the_others_are_said():
    runs = [chat(9.0), chat(6.0, actor_zero_stage=2), chat(8.0, offload=True), run("opt")]
    rows = rows_of(figure8, runs)
    base, ours = (rows["orion", "7B/350M", name, "1"] for name in ("DS-Chat", "PUZZLE"))
    assert (base.logs, ours.value) == (("6.0.jsonl",), 6.0 / 3.0)
    (note,) = base.notes
    assert note.startswith("the fastest of 3 settings: 6 s with actor_zero_stage 2")
    assert "9 s with actor_zero_stage 3" in note
    assert "microbatch" not in note  # all have the same


def test_the_order_of_a_setting_s_keys_makes_no_other_setting():
    told = {"actor_zero_stage": 3, "enable_hybrid_engine": True, "hybrid_engine_engaged": True}
    runs = [
        replace(chat(seconds), config={"global_batch_size": 128, "deepspeed": dict(items)}, repeat=repeat)
        for repeat, (seconds, items) in enumerate(((9.0, told.items()), (7.0, reversed(told.items()))))
    ]
    row = rows_of(figure8, runs)["orion", "7B/350M", "DS-Chat", "1"]
    assert (row.notes, row.logs, row.n) == ((), ("9.0.jsonl", "7.0.jsonl"), 2)


def test_one_wrong_repeat_makes_a_setting_wrong():
    wrong = chat(6.0, actor_zero_stage=2)
    wrong = replace(wrong, reports=(Report(wrong.source, 3, f"the run warned: {UNFAITHFUL}: 3 nats"),))
    right = replace(chat(5.0, actor_zero_stage=2), repeat=1)
    row = rows_of(figure8, [chat(9.0), wrong, right])["orion", "7B/350M", "DS-Chat", "1"]
    assert row.logs == ("9.0.jsonl",)


def test_a_faster_setting_whose_tokens_are_not_its_weights_is_said_not_drawn():
    wrong = chat(6.0, actor_zero_stage=2)
    wrong = replace(wrong, reports=(Report(wrong.source, 3, f"the run warned: {UNFAITHFUL}: 3 nats"),))
    row = rows_of(figure8, [chat(9.0), wrong, run("opt")])["orion", "7B/350M", "DS-Chat", "1"]
    assert row.logs == ("9.0.jsonl",)
    assert "6 s with actor_zero_stage 2 (its tokens are not its weights')" in row.notes[0]
    (only,) = rows_of(figure8, [wrong])["orion", "7B/350M", "DS-Chat", "1"].notes
    assert only == UNFAITHFUL


def test_a_baseline_without_its_hybrid_engine_says_so():
    """Whether it was asked for or not; in every figure that draws it."""
    asked = chat(7.0, hybrid_engine_engaged=False, hybrid_engine_obstacle="no GPU")
    unasked = chat(7.0, enable_hybrid_engine=False, hybrid_engine_engaged=False, hybrid_engine_obstacle=None)
    for one, said in (
        (asked, "DeepSpeed-Chat without its Hybrid Engine, which could not engage: no GPU"),
        (unasked, "DeepSpeed-Chat without its Hybrid Engine"),
    ):
        for figure, series in ((figure8, "DS-Chat"), (table3, "DS-Chat"), (figure12, "Stage1 (Gen.)")):
            named = replace(one, figures=(figure.NAME,))
            rows = [row for key, row in rows_of(figure, [named]).items() if key[2] == series]
            assert {row.notes for row in rows if row.notes} == {(said,)}, figure.NAME


def test_one_run_serves_every_figure_that_knows_it_by_another_name():
    """`base` is train-opt and PUZZLE without ts; where a figure has `base`, it is that."""
    figures = {
        "figures": ("figure8", "figure9", "figure11"),
        "printed": dict.fromkeys(("e2e", "training"), (9.0, 6.0)),
    }
    shorter = {**figures, "printed": dict.fromkeys(("e2e", "training"), (9.0, 3.0))}
    runs = [run("base", **figures), run("w_bulk", **shorter), run("opt", **shorter)]
    for figure, base, other in (
        (figure9, "PUZZLE w/o ts", "PUZZLE w/ ts"),
        (figure11, "train-opt", "PUZZLE"),
    ):
        rows = rows_of(figure, runs)
        assert rows["orion", "7B/350M", base, "1"].value == 1.0
        assert rows["orion", "7B/350M", other, "1"].value == 2.0
    assert rows_of(figure8, runs)["orion", "7B/350M", "PUZZLE-Base", "s"].value == 6.0


def test_a_planned_run_is_a_gap_with_its_reason_until_a_run_is_there():
    planned = run(
        "opt", printed={}, records=(Note(GAP, "no memory"), End("not run", "it needs 200 GiB")), run_id="p"
    )
    base = run("dschat")
    gap = rows_of(figure8, [base, planned])["orion", "7B/350M", "PUZZLE", "1"]
    assert (gap.value, gap.gap) == (None, "no memory")
    assert (
        rows_of(figure8, [base, planned, planned, run("opt")])["orion", "7B/350M", "PUZZLE", "1"].value == 1.0
    )


def test_theory_is_what_the_run_without_sharing_simulated():
    seconds = {"apart": 3.0, "fused": 2.0}
    found = Simulation(1, "training", seconds)
    other = Simulation(1, "inference", {"apart": 9.0, "fused": 1.0})
    times = {"printed": {"training": (9.0, 4.0, 4.0)}, "figures": ("figure10",)}
    runs = [run("wo_bulk", records=(other, found), **times), run("w_bulk", **times)]
    config = "7B/350M bs128 (8,1,1)"
    assert rows_of(figure10, runs)["orion", config, "Theoretical", "1"].value == 1.5
    # Of a log without, nothing is known.
    runs[0] = run("wo_bulk", **times)
    row = rows_of(figure10, runs)["orion", config, "Theoretical", "1"]
    assert (row.value, row.gap) == (None, "no theory")


def described(variant, e2e=4.0, **changes):
    config = {
        "global_batch_size": 128,
        "seed": 0,
        "generation": {"layout": {"tp": 1, "pp": 8, "dp": 1}, "decode_microbatch": 16, "early_stop": True},
        "intra": {"fuse_training": False},
        "log": {"variant": variant},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section] = {**config[section], name: value}
    return run(variant, config=config, printed={"e2e": (9.0, e2e, e2e)}, figures=("ablation",))


def test_ablation_compares_runs_that_differ_in_one_thing():
    runs = [
        described("base"),
        described("reshard", 2.0, generation__layout={"tp": 2, "pp": 4, "dp": 1}),
        described("w_bulk", 5.0, intra__fuse_training=True, log__samples=3),
        described("opt", 1.0, generation__decode_microbatch=64, intra__fuse_training=True),
        described("odd", 1.0, generation__temperature=0.5),
        described("both", 1.0, intra__fuse_training=True, generation__temperature=0.5),
    ]
    found = {key[1:3]: row.value for key, row in rows_of(ablation, runs).items() if key[3] == "1"}
    assert found == {
        ("7B/350M generation layout: 1,8,1 to 2,4,1", "baseline"): 1.0,
        ("7B/350M generation layout: 1,8,1 to 2,4,1", "with one change"): 2.0,
        ("7B/350M fused training: off to on", "baseline"): 1.0,
        ("7B/350M fused training: off to on", "with one change"): 0.8,
    }
    assert not rows_of(ablation, runs[1:])


def test_an_ablation_without_logs_is_not_missing(tmp_path):
    page.main(["--logs", str(builders.figure8(tmp_path / "logs")), "--out", str(tmp_path / "out")])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- figure9, figure10, figure11, figure12, table3: no log\n" in report
    assert "ablation" not in report
