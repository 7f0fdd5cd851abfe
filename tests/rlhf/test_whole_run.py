"""What folders and logs of whole runs hold, against what was asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from puzzle.config.base import RunConfig
from puzzle.engine.runtime.world import World
from puzzle.rlhf import session, trainer
from puzzle.rlhf.supervised.trainer import SupervisedTrainer
from tests.rlhf.one_process import configured, run, trainer_of
from tests.rlhf.started import MODEL, TASKS, config, laid_out, of, start

MOMENT = "2020-01-02T03:04:05+00:00"
folder = pytest.fixture(laid_out)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_what_it_was_started_as_and_goes_on(folder: Path, task: str) -> None:
    """It began when its starter says, was given what that was given, and says why it goes on."""
    given, out = {"batch": 2}, folder / "out"
    records = start(config(folder, task), out, False, "", given, MOMENT)
    (header,) = of(records, "run")
    assert (header["started"], header["given"]) == (MOMENT, given)
    assert [record["iteration"] for record in of(records, "iteration")] == [0, 1]
    assert [record["iteration"] for record in of(records, "evaluation")] == [0, 1, 2]
    more = config(folder, task).model_copy(update={"iterations": 3})
    records = start(more, out, True, "its host was lost", given, MOMENT)
    assert "its host was lost" in [record["text"] for record in of(records, "warning")]
    assert [record["iteration"] for record in of(records, "iteration")] == [0, 1, 2]
    assert [record["iteration"] for record in of(records, "evaluation")] == [0, 1, 2, 3]
    (resume,) = of(records, "resume")
    assert (resume["iteration"], resume["checkpoint"]) == (2, "checkpoints/state-2")
    assert [record["status"] for record in of(records, "end")] == ["completed"] * 2


@pytest.mark.parametrize(
    ("every", "numbered", "states"), [(1, [1, 2], [1, 2, 3]), (2, [2], [2, 3]), (0, [], [3])]
)
def test_the_log_tells_of_every_folder_that_was_saved(
    folder: Path, every: int, numbered: list[int], states: list[int]
) -> None:
    """Models between iterations, a checkpoint to resume from beside each and one at the end."""
    asked = config(folder, "rl", checkpoint={"every": every, "keep": 9}, reward={"init": MODEL})
    records = start(asked.model_copy(update={"iterations": 3}), folder / "out")
    told = {(record["path"], record["iteration"]) for record in of(records, "checkpoint")}
    expected = {(f"checkpoints/iteration-{n}", n) for n in numbered}
    expected |= {(f"checkpoints/state-{n}", n) for n in states}
    assert told == expected | {("checkpoints/last", 3), ("checkpoints/last-critic", 3)}
    there = {path.name for path in (folder / "out/checkpoints").iterdir()}
    assert there == {Path(path).name for path, _ in told}
    for record in of(records, "checkpoint"):
        files = list((folder / "out" / record["path"]).iterdir())
        if "state-" in record["path"]:
            ranks = [file for file in files if file.name.startswith("rank-")]
            assert record["bytes"] == sum(file.stat().st_size for file in ranks)
            assert 0 < record["seconds"] < 60
        else:
            assert {"config.json", "model.safetensors"} <= {file.name for file in files}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_saves_nothing_leaves_no_folder(folder: Path, task: str) -> None:
    records = start(config(folder, task, checkpoint={"save": False, "every": 1}), folder / "out")
    assert not of(records, "checkpoint")
    assert not (folder / "out/checkpoints").exists()


def test_samples_say_which_prompts_were_held_out(folder: Path) -> None:
    start(config(folder, "rl"), folder / "out")
    lines = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert {line["held_out"] for line in lines} == {True, False}
    assert all(line["held_out"] == line["prompt"].startswith("test") for line in lines)
    assert sum(line["held_out"] for line in lines) == 3 * 3  # as many evaluations of three prompts


@pytest.mark.parametrize(
    ("reward", "longest"),
    [
        ({"init": MODEL}, 0.0),
        ({"function": "puzzle.rlhf.rewards:letter_share", "timeout": 77.0, "workers": 1}, 77.0),
    ],
)
def test_functions_may_compute_as_long_as_they_are_allowed_and_end_with_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reward: dict[str, Any], longest: float
) -> None:
    """That long may a rank wait without a sign of life."""
    limits: list[float] = []

    def hold(*given: Any) -> None:
        limits.append(signature(session.hold).bind(*given).arguments["longest"])
        session.hold(*given)

    monkeypatch.setattr(trainer, "hold", hold)
    before = children()
    records = start(config(folder, "rl", reward=reward), folder / "out")
    assert limits == [longest]
    assert children() <= before
    assert of(records, "end")[0]["status"] == "completed"


def children() -> set[str]:
    """Processes of this one that have not been waited for."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


PLANNED = [1.0, 5.0, 2.0, 3.0, 4.0]
"""Held-out rewards: the best is early, and all later ones are better than none."""


def planned(folder: Path) -> Callable[..., list[float]]:
    """A reward function that gives these to held-out prompts, and to others what their letters say."""
    evaluations = folder / "evaluations"  # what a resumed run's function has to know, too

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if not prompts[0].startswith("test"):
            return [float(sum(map(ord, response)) % 7) for response in responses]
        done = len(evaluations.read_text()) if evaluations.exists() else 0
        evaluations.write_text("." * (done + 1))
        return [PLANNED[done]] * len(responses)

    return score


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lr", [0.003, 0.5])
def test_a_resumed_run_knows_all_that_a_run_in_one_piece_does(folder: Path, task: str, lr: float) -> None:
    """The same numbers, whether losses fall or rise; and a model is the best beside those before it, too."""
    role = "reward" if task == "reward-model" else "actor"
    options: dict[str, Any] = {"checkpoint": {"every": 2, "best": True, "asynchronous": False}}
    options[role] = {"init": MODEL, "optimizer": {"lr": lr, "warmup": 3, "schedule": "cosine"}}
    if task == "rl":
        kl = {"coef": 0.3, "target": 0.01, "horizon": 4}
        options["algorithm"] = {"reward_norm": True, "kl": kl}
        options |= {"reward": {"function": "given", "workers": 0}, "batch": 3}
    asked = config(folder, task, **options)
    asked = asked.model_copy(update={"iterations": 4})
    found = []
    for name in ("whole", "parts"):
        own = folder / name
        own.mkdir()
        more = (planned(own),) if task == "rl" else ()
        if name == "parts":
            interrupt(asked, own / "out", 2, *more)
        found.append(start(asked, own / "out", name == "parts", "", None, None, *more))
    for kind in ("iteration", "evaluation"):
        told = [[(r["iteration"], untimed(r["metrics"])) for r in of(records, kind)] for records in found]
        assert told[0] == told[1]
        assert [number for number, _ in told[0]] == list(range(4 if kind == "iteration" else 5))
    heldout = [record["metrics"] for record in of(found[0], "evaluation")]
    quality = [metrics["reward"] if task == "rl" else -metrics["loss"] for metrics in heldout]
    best = [n for n, x in enumerate(quality) if x > max(quality[:n], default=float("-inf"))]
    for records in found:
        saved = [r["iteration"] for r in of(records, "checkpoint") if r["path"] == "checkpoints/best"]
        assert saved == best


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "tokens_per_device_second"}


class LostError(Exception):
    """A run's host is gone."""


def interrupt(config: RunConfig, out: Path, done: int, *more: Any) -> None:
    """The first `done` iterations of a run that ends there without warning."""

    class Lost(session.Recorder):
        synced = 0

        def sync(self) -> None:
            super().sync()
            self.synced += 1
            if self.synced == done:
                raise LostError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Recorder", Lost)
        with pytest.raises(LostError):
            start(config, out, False, "", None, None, *more)


@pytest.mark.parametrize(("task", "forwards"), [("sft", 0), ("reward-model", 0), ("dpo", 6)])
def test_only_what_needs_a_reference_asks_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, forwards: int
) -> None:
    """Before the run, of five examples to learn from and as many held-out ones, two at a time."""
    asked: list[int] = []
    original = SupervisedTrainer._referenced

    def referenced(self: SupervisedTrainer, examples: Any) -> Any:
        asked.append(-(-len(examples) // 2))
        return original(self, examples)

    monkeypatch.setattr(SupervisedTrainer, "_referenced", referenced)
    start(config(folder, task), folder / "out")
    assert sum(asked) == forwards


class Unplaced(TorchFunctionMode):
    """Marks tensors that were made without saying on which device."""

    MAKERS: tuple[Callable[..., torch.Tensor], ...] = (torch.tensor, torch.zeros, torch.full, torch.ones)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.MAKERS and "device" not in (kwargs or {}):
            made.unplaced = True
        return made


def test_what_ranks_share_is_made_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL adds up no tensors of the host; a run on CPUs would not tell."""
    shared: list[bool] = []
    for name in ("sum", "max"):
        own = getattr(World, name)

        def watched(self: World, x: torch.Tensor, *more: Any, own: Any = own, **options: Any) -> Any:
            shared.append(hasattr(x, "unplaced"))
            return own(self, x, *more, **options)

        monkeypatch.setattr(World, name, watched)
    with Unplaced():
        assert hasattr(torch.tensor(1.0), "unplaced")
        run(trainer_of(configured(generation={"samples": 2}, eval={"every": 1})))
    assert len(shared) > 5
    assert not any(shared)
