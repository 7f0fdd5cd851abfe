"""Which iterations are timed and traced, and what the log gets of them, against the rules in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.rlhf import tracer as module
from puzzle.rlhf.tracer import Tracer
from puzzle.runlog.records import Simulation, Stage


class Log:
    """In the place of a Recorder."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.simulations: list[tuple[int, str]] = []
        self.traced: list[int] = []

    def write(self, *records: Any) -> None:
        self.stages += [record.name for record in records if isinstance(record, Stage)]
        self.simulations += [(r.iteration, r.stage) for r in records if isinstance(r, Simulation)]

    def trace(self, iteration: int, _timeline: Any) -> None:
        self.traced.append(iteration)


class Shared:
    """In the place of a FusedPipeline: `decide`, which is asked once, answers `fused`."""

    def __init__(self, fused: bool, can_fuse: bool = True, undecided: bool = True, stages: int = 2) -> None:
        self.fused, self.can_fuse, self.undecided, self.num_stages = fused, can_fuse, undecided, stages
        placement = SimpleNamespace(ranks=(0,), coord_of=lambda _: SimpleNamespace(p=0))
        model = SimpleNamespace(placement=placement, spec=SimpleNamespace(tied=False))
        self.models = {"actor": model}

    def simulated(self, _cost: Any, _train: bool) -> dict[str, float]:
        return {"apart": 2.0, "fused": 1.0}

    def decide(self, _cost: Any, _train: bool) -> bool:
        assert self.undecided
        self.undecided = False
        return self.fused


def followed(
    monkeypatch: pytest.MonkeyPatch,
    pipelines: dict[str, Any],
    iterations: int,
    traced: tuple[int, ...] = (),
    first: int = 0,
) -> tuple[list[int], Log]:
    """In which iterations anything was timed, and the log."""

    def stage_records(_world: World, _clock: Any) -> list[dict[str, Any]]:
        return [{"name": n, "schedule": "1f1b", "hash": "0"} for n in ("generation", "training.actor")]

    monkeypatch.setattr(module, "stage_records", stage_records)
    world, log, timed = World(0, 1, torch.device("cpu")), Log(), []
    tracer = Tracer(world, traced, iterations, pipelines)
    for iteration in range(first, iterations):
        tracer.start(iteration)
        if world.clock is not None:
            timed.append(iteration)
        tracer.read(iteration, StageClock(world), log)  # ty: ignore[invalid-argument-type]
        assert world.clock is None
    return timed, log


@pytest.mark.parametrize("traced", [(), (0,), (1, 3), (4,)])
def test_the_second_iteration_is_timed_and_those_that_are_traced(
    monkeypatch: pytest.MonkeyPatch, traced: tuple[int, ...]
) -> None:
    timed, log = followed(monkeypatch, {}, 5, traced)
    assert timed == sorted({1, *traced})
    assert log.traced == list(traced)
    assert log.stages == ["generation", "training.actor"]  # once


@pytest.mark.parametrize(("first", "iterations", "timed"), [(0, 1, [0]), (3, 7, [4]), (3, 4, [3])])
def test_the_last_iteration_need_not_be_warm(
    monkeypatch: pytest.MonkeyPatch, first: int, iterations: int, timed: list[int]
) -> None:
    """The second of this process, where it resumes a run; the only one that it has."""
    assert followed(monkeypatch, {}, iterations, first=first)[0] == timed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_models_that_newly_share_a_pipeline_are_timed_again(
    monkeypatch: pytest.MonkeyPatch, training: bool, inference: bool
) -> None:
    monkeypatch.setattr(module, "measured_costs", lambda *_: None)
    pipelines = {"training": Shared(training), "inference": Shared(inference)}
    timed, log = followed(monkeypatch, pipelines, 6)
    assert timed == ([1, 2] if training or inference else [1])
    assert log.simulations == [(n, stage) for n in timed for stage in ("training", "inference")]


@pytest.mark.parametrize(
    ("can_fuse", "undecided", "stages", "simulated"),
    [
        (False, True, 2, False),
        (True, True, 2, True),
        (True, False, 2, True),
        (True, True, 1, True),
        (True, False, 1, False),
    ],
)
def test_only_what_models_could_share_is_simulated(
    monkeypatch: pytest.MonkeyPatch, can_fuse: bool, undecided: bool, stages: int, simulated: bool
) -> None:
    """And of one stage only what has not been decided on."""
    monkeypatch.setattr(module, "measured_costs", lambda *_: None)
    pipeline = Shared(False, can_fuse, undecided, stages)
    found, log = followed(monkeypatch, {"training": pipeline}, 4)
    assert found == [1]
    assert log.simulations == ([(1, "training")] if simulated else [])
    assert pipeline.undecided == (undecided and not simulated)
