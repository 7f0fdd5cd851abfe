"""`puzzle plan predict`, `compare` and `calibrate` from the command line."""

import json
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.files import jsonio
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.simulate.timeline import Timeline
from puzzle.runlog.load import load_runs

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "logs" / "published"
CONFIG = """\
actor: {init: {preset: 7b}}
critic: {init: {preset: 7b}}
reward: {init: {preset: 7b}}
layout: {tp: 1, pp: 16}
batch: 256
dtype: bf16
data: {random_tokens: 256}
generation: {max_new_tokens: 256, prefill_microbatch: 4, decode_microbatch: 64, layout: {tp: 2, pp: 8}}
algorithm: {microbatch: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_a_configuration_is_predicted_as_its_published_run(config: Path, capsys) -> None:
    """The same settings as figure 11's opt, but for fusion, and with the critic's step."""
    given = ["plan", "predict", "--config", str(config), "--calibration", "published-orion"]
    assert main([*given, "--intra.fuse_training", "true", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert main(["plan", "compare", str(PUBLISHED / "figure11" / "orion" / "7b_7b_opt.jsonl"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]["published-orion"]
    rates = read_calibration("published-orion").rates
    step = rates.step_bytes * 6.607e9 / 16 / rates.memory
    stages = {key: value for key, value in row["predicted"].items() if key != "end to end"}
    stages["training"] += step
    assert numbers["stages"] == pytest.approx(stages, rel=1e-4)
    assert numbers["end_to_end"] == pytest.approx(sum(stages.values()), rel=1e-4)
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "calibrated on figure8/orion/7b_7b_base" in text
    assert "one rate for links inside nodes and between them" in text


def test_what_does_not_fit_is_said(config: Path, capsys) -> None:
    """The dry run's table for such a device has the same rank and bytes."""
    given = ["--config", str(config), "--layout.pp", "2", "--generation.layout.pp", "1"]
    predicted = ["plan", "predict", *given, "--calibration", "published-orion"]
    assert main([*predicted, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert main(["train", *given, "--dry-run", "--device-memory", "80GB"]) == 2
    assert f"rank {memory['rank']} in {memory['stage']}:" in capsys.readouterr().out
    assert memory["bytes"] > memory["of"] == 80_000_000_000
    assert main(predicted) == 0
    assert "GiB of 74.5 in" in (text := capsys.readouterr().out)
    assert "TOO MUCH; most of it" in text
    assert main([*predicted, "--layout.pp", "16", "--generation.layout.pp", "8"]) == 0
    assert "TOO MUCH" not in capsys.readouterr().out


def test_the_limit_is_the_exit_code(capsys) -> None:
    given = ["plan", "compare", str(PUBLISHED / "figure8" / "phoenix")]
    assert main(given) == 0
    assert main([*given, "--limit", "5"]) == 0
    assert "mean absolute, 4 runs not calibrated on" in capsys.readouterr().out
    assert main([*given, "--limit", "3"]) == 1
    assert main([*given, "--calibration", "published-orion", "--limit", "5"]) == 1


def test_runs_of_ours_are_compared(capsys) -> None:
    """By the configuration that the log carries. Its GPUs are faster than those of the calibration."""
    log = ROOT / "logs" / "node" / "7b_7b_w_bulk_32_1-2-1"
    assert main(["plan", "compare", str(log), "--calibration", "published-orion", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]["published-orion"]
    assert row["measured"]["end to end"] > 0
    assert not row["calibrated_on"]
    assert row["predicted"]["training"] > row["measured"]["training"]


def test_calibrating_writes_what_predict_reads(tmp_path: Path, capsys) -> None:
    logs, out = str(PUBLISHED / "figure8" / "phoenix"), tmp_path / "made.json"
    used = list(read_calibration("published-phoenix").runs)
    labels = ["--device", "A100 80 GB, NVLink", "--engine", "published", "--host", "phoenix: nodes of 8"]
    labels += ["--device-memory", "80GB"]
    given = ["plan", "calibrate", "--logs", logs, "--expect", "expected-nvlink", *labels, "--out", str(out)]
    assert main([*given, "--use", *used]) == 0
    assert read_calibration(str(out)) == read_calibration("published-phoenix")
    assert main([*given, "--use", "figure8/phoenix/none"]) == 2
    assert "--use figure8/phoenix/none: no such run; there are figure8/phoenix" in capsys.readouterr().err


def test_a_prediction_is_a_log_that_says_so(config: Path, tmp_path: Path, capsys) -> None:
    """Its stages are those that were printed, and its timeline takes as long; it is not mixed with others."""
    out, lengths = tmp_path / "log", tmp_path / "responses.jsonl"
    lengths.write_text('{"response_ids": [1, 2, 3]}\n40\n')
    given = [
        "plan",
        "predict",
        "--config",
        str(config),
        "--calibration",
        "published-orion",
        "--iterations",
        "2",
    ]
    assert main([*given, "--lengths", str(lengths), "--log", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (run,) = load_runs(out).runs
    assert (run.provenance, len(run.iterations)) == ("simulated", 2)
    for one in run.iterations:
        assert {**said["stages"], "other": 0.0} == pytest.approx(one.stage_seconds)
    trace = Timeline.from_perfetto(jsonio.read(out / "traces" / "iteration-0.json"), "trace")
    assert trace.rows == tuple(range(16))
    assert trace.makespan == pytest.approx(said["end_to_end"], rel=0.01)
    assert main([*given, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["stages"]
    assert all(said["stages"][stage] < whole[stage] for stage in ("generation", "inference", "training"))
    assert main([*given, "--lengths", str(lengths), "--log", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ("exponential", "give a mean from 1 to"),
        ("exponential:-3", "give a mean from 1 to"),
        ("never", "no such file; or give fixed, or exponential:MEAN"),
        ("BAD", "responses.jsonl:2: must be a response with response_ids"),
        ("EMPTY", "at least one of them"),
    ],
)
def test_no_lengths_are_one_line(config: Path, tmp_path: Path, capsys, lengths: str, said: str) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('3\n{"response": "a"}\n' if lengths == "BAD" else "")
    told = str(file) if lengths.isupper() else lengths
    given = ["plan", "predict", "--config", str(config), "--calibration", "published-orion"]
    assert main([*given, "--lengths", told]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["predict", "--config", "CONFIG", "--calibration", "none"],
            "no such file, and no profile; there are",
        ),
        (["predict", "--config", "CONFIG"], "--calibration"),
        (["compare", "CONFIG"], "no readable run under"),
        (["compare", str(PUBLISHED / "figure8"), "--limit", "0"], "give a finite number above 0"),
        (
            ["compare", str(PUBLISHED / "figure8" / "orion" / "7b_7b_dschat.jsonl")],
            "no run of PUZZLE with timed",
        ),
    ],
)
def test_mistakes_are_one_line(config: Path, capsys, arguments: list[str], said: str) -> None:
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    assert main(["plan", *given]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "changes", "said"),
    [
        ("run", {"config": {}}, "bulk is missing; it must be true or false"),
        (
            "run",
            {"config": {"bulk": True, "global_batch_size": "256"}},
            "global_batch_size must be a whole number",
        ),
        ("run", {"layouts": {}}, "layouts: training is missing; it must be an object"),
        (
            "run",
            {"layouts": {"training": {"tp": 0, "pp": 8, "dp": 1}}},
            "tp must be a whole number from 1 to 1024",
        ),
        (
            "run",
            {"layouts": {"training": {"tp": 1, "pp": 64, "dp": 1}}},
            "pp=64 is more than the model's 32 layers",
        ),
        ("run", {"actor": "14B"}, "no published model size '14B'"),
        ("printed", {"values": [2.0, 0.0, 1.0]}, "must be positive and below 1e+10"),
    ],
)
def test_logs_that_lack_settings_are_refused_in_one_line(
    tmp_path: Path, capsys, record: str, changes: dict, said: str
) -> None:
    lines = (PUBLISHED / "figure8" / "orion" / "7b_7b_opt.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for one in found:
        del one["crc"]
        one.update(changes if one["record"] == record else {})
    (tmp_path / "run.jsonl").write_text("\n".join(map(json.dumps, found)))
    assert main(["plan", "compare", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1
