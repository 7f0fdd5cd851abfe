"""Every figure's numbers follow from the shipped logs; the formulas are written out once more here."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from puzzle.runlog import load_runs
from tests.plotting import builders

ROOT = Path(__file__).parents[2]
TABLE = builders.TABLE
RUNS = load_runs(ROOT / "logs" / "published")
BY_ID = {run.run_id: run for run in RUNS.runs}

SPEEDUPS = {
    "figure8": ("e2e", "DS-Chat", {"DS-Chat": "dschat", "PUZZLE-Base": "base", "PUZZLE": "opt"}),
    "figure9": ("training", "PUZZLE w/o ts", {"PUZZLE w/o ts": "wo_bulk", "PUZZLE w/ ts": "w_bulk"}),
    "figure11": ("e2e", "train-opt", {"train-opt": "train_opt", "gen-opt": "gen_opt", "PUZZLE": "opt"}),
}


def printed(figure, cluster, pair, variant):
    return BY_ID[f"{figure}/{cluster}/{pair.lower().replace('/', '_')}_{variant}"].printed


def late(series):
    return fmean(series[1:])


def minus(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


def speedup(figure, cluster, pair, series, unit):
    quantity, baseline, variants = SPEEDUPS[figure]
    own = late(printed(figure, cluster, pair, variants[series])[quantity])
    if unit == "s":
        return own
    return late(printed(figure, cluster, pair, variants[baseline])[quantity]) / own


def figure10(config, series):
    pair, batch, layout = config.split(" ")
    label = f"{pair}_{batch.removeprefix('bs')}_{layout.strip('()').replace(',', '_')}"
    if series == "Theoretical":
        return printed("figure10", "orion", label, "theoretical")["training_speedup"][0]
    with_ts = printed("figure10", "orion", label, "w_bulk")["training"][1:]
    without = printed("figure10", "orion", label, "wo_bulk")["training"][1:]
    if series == "PUZZLE":
        return fmean(without) / fmean(with_ts)
    ratios = [slow / fast for slow, fast in zip(without, with_ts, strict=True)]
    return max(abs(ratios[-1] - ratio) for ratio in ratios)


def figure12(cluster, system, series):
    variant = {"DSChat": "dschat", "PUZZLE-Base": "base", "PUZZLE": "opt"}[system]
    times = printed("figure12", cluster, "7B/7B", variant)
    if variant == "dschat":
        return {
            "Stage1 (Gen.)": lambda: late(times["generation"]),
            "Stage2 (Infer.)": lambda: late(minus(times["experience"], times["generation"])),
            "Stage3 (Train.)": lambda: late(times["training"]),
            "Comm.": lambda: late(times["gather"]),
        }[series]()
    reshard = times.get("reshard", (0.0,) * len(times["generation"]))
    return {
        "Stage1 (Gen.)": lambda: late(minus(times["generation"], reshard)),
        "Stage2 (Infer.)": lambda: late(times["inference"]),
        "Stage3 (Train.)": lambda: late(times["training"]),
        "Comm.": lambda: late(reshard),
    }[series]()


def table3(cluster, pair, system):
    variant, quantity = {"PUZZLE": ("opt", "reshard"), "DS-Chat": ("dschat", "gather")}[system]
    return late(printed("table3", cluster, pair, variant)[quantity])


@pytest.mark.parametrize(("figure", "cluster", "config", "series", "value", "unit"), TABLE)
def test_every_number_of_every_figure(figure, cluster, config, series, value, unit):
    if figure in SPEEDUPS:
        found = speedup(figure, cluster, config, series, unit)
    elif figure == "figure10":
        found = figure10(config, series)
    elif figure == "figure12":
        found = figure12(cluster, config, series)
    else:
        found = table3(cluster, config, series)
    assert found == pytest.approx(value, abs=1e-9, rel=0)


def test_nothing_is_wrong_with_the_shipped_logs():
    assert RUNS.reports == ()
    assert [report for run in RUNS.runs for report in run.reports] == []
    assert {run.provenance for run in RUNS.runs} == {"published"}


def test_every_log_names_its_source():
    for path in (ROOT / "logs" / "published").rglob("*.jsonl"):
        header = json.loads(path.read_text().splitlines()[0])
        assert header["run_id"] == str(path.relative_to(ROOT / "logs" / "published").with_suffix(""))
        assert header["log"]["name"].startswith(f"{header['figures'][0]}")
        if header["variant"] != "theoretical":
            assert re.fullmatch(r"[0-9a-f]{64}", header["log"]["sha256"])


def test_iterations_and_printed_series_say_the_same():
    for run in RUNS.runs:
        for one in run.iterations:
            stages = one.stage_seconds
            assert one.e2e_seconds == pytest.approx(run.printed["e2e"][one.iteration], abs=1e-9)
            if "generation" in run.printed:
                whole = stages["generation"] + stages["switch"]
                assert whole == pytest.approx(run.printed["generation"][one.iteration], abs=1e-8)
            if run.variant != "dschat":
                assert stages["training"] == pytest.approx(run.printed["training"][one.iteration], abs=1e-9)
            switch = run.printed.get("gather", run.printed.get("reshard"))
            assert stages["switch"] == (switch[one.iteration] if switch else 0.0)


def test_the_shipped_logs_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "logs" / "published").rglob("*.jsonl")) < 2e6


def test_what_is_irregular_is_noted():
    kinds = {
        (run.run_id, note["kind"]) for run in RUNS.runs for note in run.notes if note["kind"] != "constant"
    }
    assert kinds == {
        ("figure8/orion/33b_7b_opt", "arguments"),
        ("figure8/orion/13b_350m_opt", "offset"),
        ("figure11/orion/33b_7b_opt", "offset"),
        ("table3/orion/13b_350m_opt", "offset"),
        ("table3/orion/33b_7b_opt", "offset"),
        ("table3/orion/7b_7b_opt", "copy"),
        ("figure11/orion/7b_7b_gen_opt", "sum"),
        ("figure8/phoenix/7b_350m_base", "repaired"),
        ("figure11/phoenix/7b_350m_train_opt", "repaired"),
        ("figure12/orion/7b_7b_dschat", "glued"),
    }
