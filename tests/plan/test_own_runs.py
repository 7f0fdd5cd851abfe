"""What the data sheet of an H200, and a calibration of one, predict beside what this engine took on some."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from puzzle.cli import main
from puzzle.cli.plan_compare import compared, mean_errors
from puzzle.cli.workloads import measured_runs
from puzzle.plan.layout import Layout
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.costs import Pass
from puzzle.plan.predict.iteration import predict
from puzzle.plan.predict.passes import decode_stages, stage_costs
from puzzle.spec.published import published

LOGS = Path(__file__).parents[2] / "logs"
BENCH, RUNS = LOGS / "bench", LOGS / "campaign" / "1xh200"
H200 = read_calibration("h200")
SPEC, ONE = published("7b"), Layout.even(1, 1, 1, 32)


def rows(folder: str, bench: str) -> Iterator[dict]:
    for line in (BENCH / folder).read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == bench and row["layout"] == [1, 1, 1]:
            yield row


def test_generation_of_a_7b_shape() -> None:
    """Its decode passes are what `unhidden` and the floor of a layer are from; prefill is not."""
    found = list(rows("2026-12-01-1xh200-tiles/generate.jsonl", "generate"))
    assert [row["sequences"] for row in found] == [16, 32, 64, 128, 256]
    for row in found:
        sequences = row["sequences"]
        each = min(sequences, 32)
        prefill = stage_costs(SPEC, ONE, Pass(each * 256, 256, each), H200.costs).forward[0]
        assert sequences // each * prefill == pytest.approx(row["prefill_s"], rel=0.06)
        steps = (
            decode_stages(SPEC, ONE, sequences, 256 + k, H200.costs, True).step(1) for k in range(1, 256)
        )
        assert sum(steps) == pytest.approx(row["decode_s"], rel=0.04)


def test_training_of_a_7b_shape() -> None:
    """Four micro-batches of four rows of 512 tokens, logits at every position; and an optimizer step."""
    one = Pass(2048, 512, 2048, trained=True)
    stages = stage_costs(SPEC, ONE, one, H200.costs)
    passes = [row for row in rows("2026-11-22-2xh200-f/results.jsonl", "train") if row["pass"] == "train"]
    assert len(passes) == 1
    predicted = 4 * (stages.forward[0] + stages.backward[0])
    assert predicted == pytest.approx(median(passes[0]["seconds"]), rel=0.05)
    seconds = [
        median(row["seconds"])
        for row in rows("2026-11-22-2xh200-b/results.jsonl", "train")
        if row["mode"] == "compile" and row["pass"] == "train"
    ]
    assert H200.costs.step(SPEC.parameters, 1, False) == pytest.approx(max(seconds) - min(seconds), rel=0.05)


@pytest.mark.parametrize(
    ("name", "bars"), [("h200-measured", (8.5, 6, 15, 12)), ("h200", (13, 11.5, 21, 12))], ids=str
)
def test_iterations_that_nothing_was_fitted_on(name: str, bars: tuple[float, ...]) -> None:
    """Small models, much of which waits for a host whose speed varies: docs/planner.md."""
    held = measured_runs([RUNS, BENCH / "2026-12-01-1xh200-tiles" / "first-before"])
    assert len(held) == 8
    errors = [100 * share for share in mean_errors(compared(held, read_calibration(name))).values()]
    assert all(error <= bar for error, bar in zip(errors, bars, strict=True)), errors


def test_decode_passes_that_were_timed_by_themselves() -> None:
    """The profile's are of a 7B shape with all layers; generation of the same engine took as long."""
    measured = read_calibration("h200-measured").costs
    found = list(rows("2026-12-01-1xh200-tiles/generate.jsonl", "generate"))
    for row in found:
        steps = (
            decode_stages(SPEC, ONE, row["sequences"], 256 + k, measured, True).step(1) for k in range(1, 256)
        )
        assert sum(steps) == pytest.approx(row["decode_s"], rel=0.05)


def test_runs_of_another_dtype_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Seconds of half precision say nothing of a run in single."""
    model = "{init: {preset: 350m}}"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"actor: {model}\ncritic: {model}\nreward: {model}\nbatch: 4\ndata: {{random_tokens: 8}}\n"
    )
    for dtype, told in (("fp32", True), ("bf16", False)):
        given = ["--config", str(config), "--calibration", "h200", "--dtype", dtype]
        assert main(["plan", "predict", *given]) == 0
        said = "the calibration is of weights of 2 bytes, the run's have 4 (dtype)"
        assert (said in capsys.readouterr().out) is told


def test_advantages_that_follow_one_from_another() -> None:
    """PPO's do, of every position of a response; those of groups do not."""
    (ppo,) = measured_runs([*RUNS.glob("350m_350m_base*")])
    (grpo,) = measured_runs([BENCH / "2026-12-01-h200" / "lora"])
    assert (ppo.work.recursed, grpo.work.recursed) == (256, 0)


def test_what_is_kept_is_not_recorded_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`compare` knows the device's memory, as `predict` does; runs from before graphs could be kept recorded
    them in every iteration."""
    (log,) = RUNS.glob("350m_350m_base*")
    assert main(["plan", "compare", str(log), "--calibration", "h200", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]["h200"]
    (one,) = measured_runs([log])
    assert one.plan is not None
    kept = replace(one.work, kept=True)
    assert row["predicted"]["generation"] == pytest.approx(predict(kept, H200.costs).generation)
    early = measured_runs([LOGS / "baseline" / "2xh200" / "opt"])
    assert [run.plan.config.keeps_graphs for run in early if run.plan is not None] == [False]
    assert one.plan.config.keeps_graphs == "auto"
    (found,) = compared(early, H200)
    quick = replace(
        H200, costs=replace(H200.rates, fixed=replace(H200.rates.fixed, capture_s_per_bucket=0.0))
    )
    (without,) = compared(early, quick)
    saved = found.predicted["generation"] - without.predicted["generation"]
    assert saved == pytest.approx(H200.rates.fixed.capture_s_per_bucket)
