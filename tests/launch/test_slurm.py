"""Under a real Slurm: the private one of four nodes that scripts/test.sh --slurm starts (SLURM_CONF)."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from puzzle.errors import UserError
from puzzle.launch import slurm
from tests.helpers import PATIENCE
from tests.launch.running import (
    ROOT,
    cleared,
    config,
    console,
    environment,
    metrics,
    of_test,
    puzzle,
    ranks,
    wait_for,
)

under_slurm = pytest.mark.slurm


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slurm.yaml").write_text('time: "00:10:00"\nnodelist: "node[1-4]"\n')
    monkeypatch.setenv("PUZZLE_SLURM", str(tmp_path / "slurm.yaml"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config()))
    with cleared(tmp_path):
        yield tmp_path


def test_variables_of_no_job_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "hostnames": "n1 n2",
        "node": "NodeName=n1 Arch=x NodeAddr=10.0.0.1\nNodeName=n2 Arch=x NodeAddr=n2",
    }
    monkeypatch.setattr(slurm, "_answer", lambda *words: answers[words[2]])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "4(x2)"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert slurm.job_nodes("cpu") == [slurm.Node("n1", "10.0.0.1", 4), slurm.Node("n2", "n2", 4)]
    odd = {
        "SLURM_JOB_NODELIST": ("",),
        "SLURM_JOB_CPUS_PER_NODE": ("", "4", "4(x1000000000)", "x"),
        "SLURM_GPUS_ON_NODE": ("two",),
    }
    for name, values in odd.items():
        for value in values:
            with monkeypatch.context() as one:
                one.setenv(name, value)
                with pytest.raises(UserError, match=f"^SLURM_JOB_ID is set but {name} "):
                    slurm.job_nodes("cpu")
    answers["node"] = ""
    with pytest.raises(UserError, match="no address of n1, n2"):
        slurm.job_nodes("cpu")


def jobs() -> list[str]:
    """Ids of the jobs that Slurm has, those that are just ending included."""
    found = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True)
    return found.stdout.split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by the local launcher."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "run.yaml").write_text(yaml.safe_dump(config()))
    run = puzzle(folder, "train", "--config", "run.yaml", "--out", "out")
    assert run.wait(PATIENCE) == 0, console(folder)
    return folder / "out"


@under_slurm
def test_srun_places_the_ranks_on_the_nodes(folder: Path, alone: Path) -> None:
    other = subprocess.run(
        ["sbatch", "--parsable", "--hold", "--wrap", "true"], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        run = puzzle(folder, "train", "--config", "run.yaml", "--out", "out", "--launcher", "slurm")
        assert run.wait(PATIENCE) == 0, console(folder)
        assert metrics(folder / "out") == metrics(alone)
        assert re.search(r"Slurm job \d+; its output, also in out/slurm.log", console(folder))
        assert "3/3" in console(folder)
        assert jobs() == [other]  # another's job is left alone
    finally:
        subprocess.run(["scancel", other], check=True)


@under_slurm
@pytest.mark.long
def test_a_killed_rank_is_named_and_the_run_resumes(folder: Path) -> None:
    long = config(iterations=60, launch={"max_restarts": 1})
    (folder / "run.yaml").write_text(yaml.safe_dump(long))
    out = folder / "out"
    run = puzzle(folder, "train", "--config", "run.yaml", "--out", "out", "--launcher", "slurm")
    wait_for(lambda: (out / "checkpoints/state-2").exists(), run=run)
    victim = ranks(folder)[2]
    os.kill(victim, signal.SIGKILL)
    assert run.wait(PATIENCE) == 0, console(folder)
    said = re.search(
        r"error: rank (\d) on (node\d): killed by SIGKILL \(out of memory, or by hand\)", console(folder)
    )
    assert said is not None, console(folder)
    assert said[2] == f"node{int(said[1]) + 1}"  # a rank a node, nodes in order
    assert len(metrics(out)) == 60
    assert jobs() == []


@under_slurm
@pytest.mark.long
def test_ray_over_the_nodes_of_a_job(folder: Path, alone: Path) -> None:
    train = [sys.executable, "-m", "puzzle.cli", "train", "--config", "run.yaml", "--out", "out"]
    job = [
        "sbatch",
        "--wait",
        "--output=job.txt",
        *slurm.settings().options(4),
        ROOT / "puzzle/launch/job.sh",
    ]
    ended = subprocess.run(
        [*job, *train, "--launcher", "ray"], cwd=folder, env=environment(PUZZLE_TEST=str(folder)), check=False
    )
    assert ended.returncode == 0, (folder / "job.txt").read_text()
    assert metrics(folder / "out") == metrics(alone)


@under_slurm
@pytest.mark.long
def test_a_campaign_cancelled_half_way_leaves_nothing_and_goes_on(folder: Path) -> None:
    def start() -> subprocess.Popen:
        with (folder / "console.txt").open("w") as said:
            return subprocess.Popen(
                [
                    ROOT / "RUNME-b.sh",
                    "--scale",
                    "cpu",
                    "--launcher",
                    "slurm",
                    "--only",
                    "table3",
                    "--iterations",
                    "2",
                ],
                cwd=folder,
                env=environment(PUZZLE_TEST=str(folder), PUZZLE_PYTHON=sys.executable),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def done() -> list[Path]:
        return list(folder.glob("outputs_from_exec_*/logs/*/done"))

    run = start()
    wait_for(lambda: len(done()) == 2 and len(ranks(folder)) > 1, run=run)
    kept = {mark: mark.stat().st_mtime_ns for mark in done()}
    os.killpg(run.pid, signal.SIGINT)  # a Ctrl-C
    assert run.wait(PATIENCE) == 130, console(folder)
    wait_for(lambda: not jobs() and not of_test(folder))
    assert start().wait(PATIENCE) == 0, console(folder)
    assert len(list(folder.glob("outputs_from_exec_*"))) == 1
    assert "4 run, 2 kept from before" in console(folder)
    assert {mark: mark.stat().st_mtime_ns for mark in kept} == kept
    assert len(done()) == 6
    assert list(folder.glob("outputs_from_exec_*/table3.csv"))


def test_settings_are_read_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.yaml"
    monkeypatch.setenv("PUZZLE_SLURM", str(file))
    file.write_text("partition: gpus\naccount: us\ntime: '1:00:00'\ngres: 'gpu:a100:8'\nnodelist: 'n[1-9]'\n")
    named = ["--partition=gpus", "--account=us", "--time=1:00:00", "--gres=gpu:a100:8", "--nodelist=n[1-9]"]
    assert slurm.settings().options(32) == [*named, "--nodes=4", "--exclusive", "--mem=0"]
    assert slurm.settings().options(9)[5] == "--nodes=2"
    file.write_text("time: '1:00:00'\n")
    assert slurm.settings().options(4) == ["--time=1:00:00", "--ntasks=4"]
    for text, words in (
        ("gres: gpu", "gres gpu: expected as gpu:8"),
        ("partion: x", "partion: extra inputs"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            slurm.settings().options(1)
    monkeypatch.delenv("PUZZLE_SLURM")
    assert slurm.settings().devices == 8
