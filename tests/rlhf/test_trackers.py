"""Trackers get a run's numbers, and can do it no harm: by accelerate's own, and by ones that misbehave."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.config.load import load_given
from puzzle.config.run import TrainConfig
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf import tracker_process
from puzzle.rlhf import trackers as module
from puzzle.rlhf.recorder import Recorder
from puzzle.rlhf.requirements import check_packages
from puzzle.rlhf.trackers import Trackers
from puzzle.runlog import load_runs
from puzzle.runlog.records import Evaluation, Iteration, Warned
from tests.rlhf.one_process import configured
from tests.runlog import texts

STAND_IN = '''
"""In the place of accelerate: writes down what it is told, and misbehaves as its environment says."""
import json, os, sys, time
class Tracker:
    def __init__(self, *arguments, **options):
        self.told = open(os.environ["TOLD"], "a")
        self.put("init", type(self).__name__, arguments, options, os.environ.get("RANK"))
    def put(self, *what):
        print(json.dumps(what), file=self.told, flush=True)
        print("noise on standard output")
        how = os.environ.get(what[0])
        if how == "raise":
            raise RuntimeError("the server said\\nno")
        if how == "hang":
            time.sleep(1000)
        if how == "exit":
            os._exit(3)
    def start(self): self.put("start")
    def store_init_configuration(self, values): self.put("config", values)
    def log(self, values, step): self.put("log", step, values)
    def finish(self): self.put("finish")
class TensorBoardTracker(Tracker): pass
class WandBTracker(Tracker): pass
class MLflowTracker(Tracker): pass
class TrackioTracker(Tracker): pass
'''
CONFIG = {"iterations": 2, "actor": {"model": None, "lr": 0.5}, "stop": ["a"]}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for accelerate writes what it is told."""
    package = tmp_path / "stand_in/accelerate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class PartialState:\n    def __init__(self, cpu): assert cpu\n")
    (package / "tracking.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("RANK", "3")
    return tmp_path / "told"


def started(out: Path, *names: str, patience: float = 60.0) -> Trackers:
    out.mkdir(exist_ok=True)
    return Trackers(names, out, "project", "some-id", CONFIG, patience)


def iteration(number: int, **metrics: float) -> Iteration:
    return Iteration(number, *texts.stages(1.0, 0.5, 2.0), metrics)


def lines(told: Path) -> list[Any]:
    return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []


def until_lost(trackers: Trackers, seconds: float = 60.0) -> list[str]:
    """What is said of lost trackers; asked again as an iteration would."""
    end = time.monotonic() + seconds
    while not (found := trackers.lost()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("name", "made", "options"),
    [
        ("tensorboard", "TensorBoardTracker", {}),
        ("wandb", "WandBTracker", {"name": "run", "id": "some-id", "resume": "allow"}),
        ("mlflow", "MLflowTracker", {"run_name": "run"}),
        ("trackio", "TrackioTracker", {"name": "run", "resume": "allow"}),
    ],
)
def test_a_tracker_is_told_everything_once(tmp_path, told, name, made, options) -> None:
    trackers = started(tmp_path / "run", name)
    trackers.iteration(iteration(4, reward=1.5, kl=math.nan))
    trackers.evaluation(Evaluation(5, {"reward": 0.25}))
    assert trackers.close() == []
    (init, start, config, *logged, finish) = lines(told)
    assert (init[1], init[4]) == (made, None)  # no rank of the run
    assert init[3].items() >= options.items()
    assert init[2][0] == ("tensorboard" if name == "tensorboard" else "project")
    assert (start, finish) == (["start"], ["finish"])
    assert config == ["config", {"iterations": 2, "actor.lr": 0.5, "stop": '["a"]'}]
    stages = {"generation": 1.0, "inference": 0.5, "training": 2.0, "switch": 0.0, "other": 0.0, "e2e": 3.5}
    seconds = {f"seconds/{stage}": value for stage, value in stages.items()}
    assert logged == [["log", 4, {"train/reward": 1.5, **seconds}], ["log", 5, {"held out/reward": 0.25}]]
    assert "noise on standard output" in (tmp_path / f"run/trackers/{name}.txt").read_text()


@pytest.mark.parametrize("when", ["init", "config", "log", "finish"])
@pytest.mark.parametrize(
    ("how", "why"),
    [("raise", "RuntimeError: the server said no"), ("exit", "its process ended with code 3")],
)
def test_one_that_breaks_is_named_once_and_dropped(tmp_path, told, monkeypatch, when, how, why) -> None:
    """Whenever it does; another tracker of the run gets everything."""
    trackers = started(tmp_path / "run", "wandb")
    monkeypatch.setenv(when, how)
    broken = started(tmp_path / "run", "mlflow")
    trackers._alive += broken._alive
    trackers.iteration(iteration(0, reward=1.0))
    said = until_lost(trackers) if when != "finish" else []
    for number in (1, 2):
        trackers.iteration(iteration(number, reward=1.0))
        assert trackers.lost() == []
    assert [*said, *trackers.close()] == [f"log.trackers: mlflow is dropped: {why}"]
    wandb = [line for line in lines(told) if line[0] == "log" and line[1] > 0]
    assert {line[1] for line in wandb} == {1, 2}


@pytest.mark.parametrize("when", ["start", "log"])
def test_one_that_hangs_is_named_once_and_dropped(tmp_path, told, monkeypatch, when) -> None:
    monkeypatch.setenv(when, "hang")
    trackers = started(tmp_path / "run", "wandb", patience=0.5 if when == "start" else 3.0)
    (process,) = (tracker._process for tracker in trackers._alive)
    trackers.iteration(iteration(0, reward=1.0))
    assert until_lost(trackers) == [
        f"log.trackers: wandb is dropped: it took nothing for {0.5 if when == 'start' else 3:g} s"
    ]
    assert process.poll() is not None
    trackers.iteration(iteration(1, reward=1.0))
    assert trackers.lost() == trackers.close() == []


def test_one_that_does_not_finish_is_ended(tmp_path, told, monkeypatch) -> None:
    monkeypatch.setenv("finish", "hang")
    trackers = started(tmp_path / "run", "wandb")
    (process,) = (tracker._process for tracker in trackers._alive)
    trackers.iteration(iteration(0, reward=1.0))
    end = time.monotonic() + 60
    while ["start"] not in lines(told) and time.monotonic() < end:
        time.sleep(0.02)
    assert trackers.close(1.0) == ["log.trackers: wandb is dropped: it did not finish within 1 s"]
    assert process.poll() is not None


def test_a_process_that_cannot_be_started_is_named_once(tmp_path, monkeypatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    trackers = started(tmp_path / "run", "wandb")
    assert trackers.lost() == ["log.trackers: wandb is dropped: Cannot allocate memory"]
    trackers.iteration(iteration(0, reward=1.0))
    assert trackers.lost() == trackers.close() == []


def recorder(out: Path, **log: Any) -> Recorder:
    config = configured(log={"trace": [], "plots": False, **log})
    return Recorder(out, config, World(0, 1, torch.device("cpu")), texts.header())


def test_a_run_goes_on_and_says_in_its_log_what_it_lost(tmp_path, told, monkeypatch, capsys) -> None:
    monkeypatch.setenv("log", "raise")
    with recorder(tmp_path / "run", trackers=["wandb"]) as log:
        log.write(iteration(0, reward=1.0))
        log.trackers._alive[0]._process.wait(60)
        log.write(iteration(1, reward=1.0))
        log.write(iteration(2, reward=1.0))
    (run,) = load_runs(tmp_path / "run").runs
    line = "log.trackers: wandb is dropped: RuntimeError: the server said no"
    assert [warned.text for warned in run.of(Warned)] == [line]
    assert [one.iteration for one in run.iterations] == [0, 1, 2]
    assert run.ended
    assert capsys.readouterr().err == f"warning: {line}\n"


def test_nothing_is_tracked_unless_it_is_asked_for(tmp_path, told) -> None:
    """By default, and where the former switch says no: no process, no file, no folder."""
    assert TrainConfig.model_fields["log"].default.trackers == ()
    with recorder(tmp_path / "run") as log:
        log.write(iteration(0, reward=1.0))
        assert log.trackers._alive == []
    assert not told.exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.jsonl", "run.log", "samples.jsonl"}


def test_the_former_switch_is_read(tmp_path, capsys) -> None:
    base = "actor: {init: {preset: 7b}}\nreward: {init: {preset: 350m}}\ndata: {random_tokens: 4}\n"
    for value, found in [("true", ("tensorboard",)), ("false", ())]:
        (tmp_path / "run.yaml").write_text(f"{base}log: {{tensorboard: {value}}}\n")
        config, given = load_given(TrainConfig, tmp_path / "run.yaml")
        assert config.log.trackers == found
        assert given["log"] == {"trackers": list(found)}
        (tmp_path / "bare.yaml").write_text(base)
        assert (
            load_given(TrainConfig, tmp_path / "bare.yaml", ["--log.tensorboard", value])[0].log.trackers
            == found
        )
        notes = capsys.readouterr().err.splitlines()
        assert len(notes) == (2 if found else 0)
        assert all("log.tensorboard is now log.trackers" in note for note in notes)


def test_a_missing_package_is_said_before_the_run(monkeypatch) -> None:
    config = configured(log={"trackers": ["wandb"]})
    for missing in ("accelerate", "wandb"):
        monkeypatch.setattr(
            "puzzle.rlhf.requirements.find_spec", lambda name, gone=missing: None if name == gone else name
        )
        with pytest.raises(UserError, match=f"wandb: the package {missing} is not installed; .*it is "):
            check_packages(config)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_the_trackers_themselves_take_it(tmp_path, monkeypatch, name) -> None:
    """accelerate's, offline."""
    pytest.importorskip("accelerate")
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    trackers = started(tmp_path / "run", name)
    for number in range(3):
        trackers.iteration(iteration(number, reward=0.25 * number))
    trackers.evaluation(Evaluation(3, {"reward": 0.5}))
    assert trackers.close(120.0) == []
    if name == "tensorboard":
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("train/reward")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
        assert [e.value for e in events.Scalars("seconds/training")] == [2.0] * 3
        assert [(e.step, e.value) for e in events.Scalars("held out/reward")] == [(3, 0.5)]
    elif name == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        assert run.data.metrics["train/reward"] == 0.5
        assert run.data.params["actor.lr"] == "0.5"
    else:
        assert any(path.is_file() for path in tmp_path.rglob("*.wandb" if name == "wandb" else "*.db"))


def test_a_tracker_that_nobody_listens_to_ends_as_failed(monkeypatch) -> None:
    """When its time to finish is over, whatever it does."""
    ends: list[int] = []
    over = threading.Event()
    monkeypatch.setattr(tracker_process, "LAST_SECONDS", 0.05)
    monkeypatch.setattr(tracker_process.os, "_exit", lambda code: (ends.append(code), over.set()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert list(tracker_process.lines()) == ["one\n", "two\n"]
    assert over.wait(60)
    assert ends == [1]
