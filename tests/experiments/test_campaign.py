import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from puzzle.campaign import runs as campaign
from puzzle.campaign.experiments import Selection, expand, read_table
from puzzle.campaign.forecast import forecast, iteration_seconds, told_hours
from puzzle.campaign.machine import Machine
from puzzle.cli import campaign as command
from puzzle.cli import main
from puzzle.errors import UserError
from puzzle.launch import slurm
from puzzle.runlog import load_runs

ROOT = Path(__file__).parents[2]
# Stands in for `puzzle train`: writes the log of a run with times that depend on the variant; some fail.
WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from puzzle.config.run import TrainConfig
from puzzle.rlhf.provenance import run_header
from puzzle.config.resolve import resolve
from puzzle.runlog import RunWriter
from puzzle.runlog.records import End, Iteration
config = TrainConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
with RunWriter(Path(sys.argv[2]), run_header(resolve(config), {{}})) as log:
    if config.log.variant == {failing!r}:
        print("working"); print("error: no room for the weights"); sys.exit(2)
    seconds = 2.0 if config.log.variant == "base" else 1.0
    stages = dict(generation=1.0, inference=1.0, training=seconds, switch=0.0, other=0.0)
    for iteration in range(3):
        metrics = dict(reward=0.0, actor_loss=0.0, critic_loss=0.0)
        log.write(Iteration(iteration, stages, 2.0 + seconds, metrics))
    log.write(End("completed"))
"""


@pytest.fixture
def experiments():
    found = expand(read_table(), Selection("cpu", only=("figure9",)))
    return [replace(experiment, lacks=()) for experiment in found[:4]]


def worker(tmp_path, failing: str):
    script = tmp_path / f"worker-{failing}.py"
    script.write_text(WORKER.format(root=str(ROOT), failing=failing))
    return lambda experiment: lambda config, folder: [sys.executable, str(script), str(config), str(folder)]


def test_failures_are_recorded_and_finished_runs_are_kept(tmp_path, experiments):
    text = io.StringIO()
    console = Console(file=text, width=200, highlight=False)
    out = tmp_path / "out"
    first = campaign.run_all(experiments, out, console, worker(tmp_path, "w_bulk"))
    assert [o.status for o in first] == ["done", "failed", "done", "failed"]
    assert first[1].why == "exit code 2: error: no room for the weights"
    assert campaign.last_lines(first[1], out)[-1] == "error: no room for the weights"
    assert "[2/4] 7B/7B w_bulk" in text.getvalue()
    kept = {o.experiment.name: (out / "logs" / o.experiment.name / "run.jsonl").stat() for o in first[::2]}
    second = campaign.run_all(experiments, out, console, worker(tmp_path, "nothing"))
    assert sorted(o.status for o in second) == ["done", "done", "kept", "kept"]
    assert {name: (out / "logs" / name / "run.jsonl").stat() for name in kept} == kept
    assert command._summary(second, out, console) == 0
    assert "2 run, 2 kept from before" in text.getvalue()
    rows = (out / "figure9.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    speedups = {tuple(row.split(",")[1:3]): float(row.split(",")[3]) for row in rows[1:]}
    assert speedups["7B/7B", "PUZZLE w/ ts"] == 2.0


def test_failed_and_absent_runs_show_in_the_exit_code(tmp_path, experiments, capfd):
    console = Console(width=200, highlight=False)
    some = [experiments[0], experiments[1], replace(experiments[2], lacks=("a thing",))]
    outcomes = campaign.run_all(some, tmp_path, console, worker(tmp_path, "w_bulk"))
    assert command._summary(outcomes, tmp_path, console) == 1
    shown = capfd.readouterr().out
    assert "not run: 7B/350M base (1,2,1) batch 8: lacks a thing" in shown
    assert "    working\n    error: no room for the weights" in shown
    assert "3 runs: 1 run, 1 failed, 1 not possible here\nfigure9  " in shown  # the results come last
    assert (
        shown.splitlines()[-1] == f"report, with 0 notes on numbers and 2 on logs: {tmp_path / 'report.md'}"
    )
    assert not (tmp_path / "logs" / some[2].name).exists()
    rows = [row.split(",") for row in (tmp_path / "figure9.csv").read_text().splitlines()[1:]]
    values = {tuple(row[1:3]): row[3] for row in rows}
    assert values == {
        ("7B/350M", "PUZZLE w/o ts"): "", ("7B/350M", "PUZZLE w/ ts"): "",
        ("7B/7B", "PUZZLE w/o ts"): "1.0", ("7B/7B", "PUZZLE w/ ts"): "",
    }  # fmt: skip
    report = (tmp_path / "report.md").read_text()
    assert "- figure9 local (rehearsal) 7B/7B PUZZLE w/ ts: failed" in report
    assert "- figure9 local (rehearsal) 7B/350M PUZZLE w/o ts: not possible" in report
    assert f"- {some[2].name}.jsonl: a thing" in report
    assert f"- {some[1].name}.jsonl: exit code 2: error: no room for the weights" in report


def test_many_failed_and_absent_runs_are_counted(tmp_path, experiments):
    text = io.StringIO()
    failed = [campaign.Outcome(experiments[0], "failed", why="exit code 2") for _ in range(5)]
    absent = [campaign.Outcome(one, "absent", why="a thing") for one in experiments]
    assert command._summary([*failed, *absent], tmp_path, Console(file=text, width=200, highlight=False)) == 1
    assert text.getvalue().splitlines() == [
        "not run: 7B/7B base (1,4,1) batch 8 and 3 more: lacks a thing",
        *["failed: 7B/7B base (1,4,1) batch 8: exit code 2"] * 3,
        f"failed: 2 more, told in {tmp_path / 'campaign.json'}",
        "9 runs: 5 failed, 4 not possible here",
    ]


def test_a_finished_run_of_another_configuration_is_not_lost(tmp_path, experiments):
    experiment = experiments[0]
    campaign.run_all([experiment], tmp_path, Console(file=io.StringIO()), worker(tmp_path, "nothing"))
    changed = experiment.config.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match="another configuration"):
        campaign.finished(tmp_path / "logs" / experiment.name, changed)


def test_the_newest_unfinished_campaign_goes_on(tmp_path, experiments):
    asked: dict[str, object] = {"scale": "cpu"}
    for name, status in [("1", "failed"), ("2", "failed"), ("3", "done")]:
        folder = tmp_path / f"outputs_from_exec_{name}"
        folder.mkdir()
        campaign.record(folder, asked, [campaign.Outcome(experiments[0], status)])
    (tmp_path / "outputs_from_exec_4").mkdir()
    found = campaign.unfinished(tmp_path, asked)
    assert found is not None
    assert found.name == "outputs_from_exec_2"
    assert campaign.unfinished(tmp_path, {"scale": "node"}) is None
    assert json.loads((found / "campaign.json").read_text())["complete"] is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_ends_its_run(tmp_path, number):
    code = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from puzzle.campaign.experiments import *; from puzzle.campaign import runs as campaign\n"
        "from puzzle.launch import local\n"
        "e = expand(read_table(), Selection('cpu', only=('figure9',)))[:1]\n"
        "from dataclasses import replace\n"
        "sleeper = 'import os,time; print(os.getpid(), flush=True); time.sleep(99)'\n"
        "with local.terminate_as_exit():\n"
        "    campaign.run_all([replace(e[0], lacks=())], Path(sys.argv[1]), Console(),\n"
        "                     lambda e: lambda c, f: [sys.executable, '-c', sleeper])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (logs := list(tmp_path.glob("logs/*/console.log"))) or not logs[0].read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(logs[0].read_text())
    parent.send_signal(number)
    parent.wait(timeout=30)
    assert parent.returncode != 0
    assert not Path(f"/proc/{pid}").exists()
    assert not (logs[0].parent / "done").exists()


def test_the_baseline_is_run_by_its_own_program():
    figure8 = expand(read_table(), Selection("cpu", only=("figure8",)))
    words = {e.variant: campaign.command_of(e, "ray")(Path("c.json"), Path("out")) for e in figure8}
    files = ["--config", "c.json", "--out", "out", "--launcher", "ray"]
    assert Path(words["dschat"][1]).is_file()
    assert words["dschat"][2:8] == files
    published = {
        "--enable_hybrid_engine",
        "--actor_gradient_checkpointing",
        "--critic_gradient_checkpointing",
        "--offload_reference_model",
    }
    assert published < set(words["dschat"])
    for one in (e.config for e in figure8 if e.variant == "dschat"):
        rows = one.batch // one.world
        assert one.algorithm.microbatch == one.generation.decode_microbatch == rows
        assert one.generation.greedy
    assert words["dschat_best"][8:] == ["--actor_zero_stage", "2", "--critic_zero_stage", "2"]
    for one in (e.config for e in figure8 if e.variant == "dschat_best"):
        assert one.log.variant == "dschat"
        rows = one.batch // one.world
        assert (one.algorithm.microbatch, one.generation.decode_microbatch) == (rows // 2, rows)
    assert words["opt"] == words["base"] == [sys.executable, "-P", "-m", "puzzle.cli", "train", *files]


def test_a_node_runs_what_its_gpus_can_hold(monkeypatch, capsys):
    def gpus(count: int, gib: int) -> Machine:
        return Machine(count, count, gib << 30, f"{count} GPUs")

    def listed(machine: Machine, *options: str) -> str:
        monkeypatch.setattr(command, "find_machine", lambda launcher: machine)
        monkeypatch.setattr(command, "has_cpu_torch", lambda: False)
        assert main(["campaign", "--dry-run", *options]) == 0
        return capsys.readouterr().out

    four = listed(gpus(4, 80), "--only", "figure9")
    assert "4 GPUs; scale node, launcher local" in four
    assert "7B/7B w_bulk (1,4,1) batch 64, 4 processes [figure9]: can run" in four
    assert "6 runs, 6 can run" in four
    assert "rank 0 needs" in listed(gpus(1, 16), "--scale", "node", "--only", "figure9")
    one = listed(gpus(1, 80))
    assert "1 GPUs; scale gpu, launcher local" in one
    assert "1.3B/350M dschat_best (1,1,1) batch 16, 1 processes [figure8,figure12]: " in one
    paper = listed(gpus(8, 80), "--scale", "paper", "--only", "table3")
    assert (
        "33B/7B opt (1,32,1 -> 2,16,1) batch 128, 32 processes [table3]: lacks 32 GPUs where there are 8"
        in paper
    )


def test_a_full_disk_is_a_failed_run(tmp_path, monkeypatch, experiments):
    full = OSError(28, "No space left on device", "some/config.json")
    ends = iter([full, campaign.Outcome(experiments[1], "done")])

    def run_one(*_arguments: object) -> campaign.Outcome:
        end = next(ends)
        if isinstance(end, OSError):
            raise end
        return end

    monkeypatch.setattr(campaign, "_run_one", run_one)
    found = campaign.run_all(
        experiments[:2], tmp_path, Console(file=io.StringIO()), worker(tmp_path, "nothing")
    )
    assert [o.status for o in found] == ["failed", "done"]
    assert found[0].why == "some/config.json: No space left on device"
    campaign.record(tmp_path, {}, found)
    assert json.loads((tmp_path / "campaign.json").read_text())["complete"] is False


def test_dry_run_lists_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["campaign", "--scale", "cpu", "--only", "figure8", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    can = "can run" if find_spec("deepspeed") else "lacks the package deepspeed"
    assert f"7B/350M dschat (1,1,2) batch 8, 2 processes [figure8]: {can}" in shown
    assert "20 runs" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "figure1"], "figure1 is unknown; did you mean figure"),
        (["--scale", "huge"], "huge is unknown; there are cpu, gpu, node, paper, rehearsal"),
        (["--repeats", "0"], "--repeats: '0': give a whole number"),
        (["--table", "absent.yaml"], "absent.yaml: no such file"),
        (["--iterations", "1"], "--iterations: '1': give a whole number, at least 2"),
        (["--launcher", "mpi"], "invalid choice: 'mpi'"),
        (["--scale", "paper"], "--scale paper needs GPUs, and there are no GPUs; use --scale cpu"),
        (["--scale", "cpu", "--launcher", "slurm"], "--launcher slurm: there is no sbatch here"),
        (["--scale", "paper", "--launcher", "slurm"], "which gres a node has, as gpu:8"),
    ],
)
def test_bad_requests_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_machine", lambda launcher: Machine(0, 0, None, "there are no GPUs"))
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    assert main(["campaign", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_login_node_is_told_how_to_reach_the_nodes(tmp_path, monkeypatch, capsys):
    """No GPU, sbatch on the path; torch is a build for CPUs, then one with CUDA."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("PUZZLE_SLURM", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["campaign", "--scale", "paper"]) == 2
    assert "use --launcher slurm, which asks Slurm for nodes" in capsys.readouterr().err
    paper = ["campaign", "--scale", "paper", "--launcher", "slurm", "--only", "table3"]
    for cpu_torch in (True, False):
        monkeypatch.setattr(command, "has_cpu_torch", lambda built=cpu_torch: built)
        assert main([*paper, "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        (big,) = [line for line in lines if line.startswith("33B/7B opt (1,32,1 -> 2,16,1)")]
        assert ("lacks a torch with CUDA" in big) is cpu_torch
        assert " GiB in training" in big
        assert any("layouts as tp,pp,dp" in line for line in lines)
        assert "job: 4 nodes of 8 GPUs, limit 8:00:00, as slurm.yaml says; submitted by" in lines
        (submitted,) = [line for line in lines if line.strip().startswith("sbatch ")]
        assert " --export=ALL " in submitted
        assert "--dry-run" not in submitted
        assert re.search(r"estimated, .*: about \d+(\.\d+)? hours .*, \d+ MB of logs", lines[-2])
        assert lines[-1].startswith(
            "predicted: not without --calibration C (a file of `puzzle bench calibrate`"
        )
    monkeypatch.setattr(command, "has_cpu_torch", lambda: True)
    assert main(paper) == 2
    assert "UV_TORCH_BACKEND=cu130" in capsys.readouterr().err
    monkeypatch.setattr(command, "has_cpu_torch", lambda: False)
    assert main(paper) == 2
    assert "sbatch refused the job" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_dry_run_predicts_hours_by_a_calibration(capsys):
    """As the published runs took, by their own calibration; of more iterations more."""
    figure8 = ["campaign", "--scale", "paper", "--cluster", "orion", "--only", "figure8", "--dry-run"]
    said = []
    for iterations in ("15", "30"):
        more = ["--calibration", "published-orion", "--device-memory", "80GB", "--iterations", iterations]
        assert main([*figure8, *more]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        found = re.fullmatch(
            r"predicted, by published-orion for A800 80 GB, PCIe: ([0-9.]+) hours for 10 runs,"
            " without 8 of the baseline",
            last,
        )
        assert found, last
        said.append(3600 * float(found[1]) - 10 * 13)
    took = [
        fmean(run.printed["e2e"][1:])
        for run in load_runs(ROOT / "logs/published").runs
        if "figure8" in run.figures and run.cluster == "orion" and run.variant in ("base", "opt")
    ]
    assert len(took) == 10
    assert said[0] == pytest.approx(15 * sum(took), rel=0.1)
    assert said[1] == pytest.approx(2 * said[0], rel=0.1)


def test_the_forecast_is_near_what_the_published_runs_took():
    took = defaultdict(list)
    for run in load_runs(ROOT / "logs/published").runs:
        if run.variant != "theoretical" and "figure8" in run.figures and run.cluster == "orion":
            took[run.actor, run.critic, run.variant].append(fmean(run.printed["e2e"][1:]))
    experiments = [
        e
        for e in expand(read_table(), Selection("paper", cluster="orion"))
        if "figure8" in e.config.log.figures and e.variant != "dschat_best"
    ]
    pairs = [
        (
            iteration_seconds(e.config),
            fmean(took[e.config.log.actor, e.config.log.critic, e.config.log.variant]),
        )
        for e in experiments
    ]
    assert len(pairs) == 15
    assert all(1 / 3 < ours / theirs < 3 for ours, theirs in pairs)
    assert sum(ours for ours, _ in pairs) == pytest.approx(sum(theirs for _, theirs in pairs), rel=0.3)
    several = forecast(experiments)
    assert several.seconds == pytest.approx(sum(forecast([e]).seconds for e in experiments))
    assert several.written == sum(forecast([e]).written for e in experiments)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(9, "0.0025"), (900, "0.25"), (352_800, "98"), (358_300, "100"), (4_400_000, "1222")],
)
def test_hours_of_long_campaigns_have_no_exponent(seconds: float, said: str) -> None:
    assert told_hours(seconds) == f"{said} hours"
