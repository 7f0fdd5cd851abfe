"""Timed training: gradients are reduced while backward passes go on; what stages are summed up to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.tracing import Clock, gathered, stage_records
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.model import hf
from puzzle.model.packing import pack
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.simulate.timeline import Timeline
from tests.helpers import run_ranks
from tests.reference.tiny import save_lm


def timed(rank: int, folder: str, layout: Layout, steps: int = 1) -> tuple[Timeline, list[dict[str, Any]]]:
    world = World(rank, layout.world, torch.device("cpu"))
    runtime = ModelRuntime("actor", hf.read_spec(Path(folder)), Placement.default(layout), world)
    hf.load(runtime.decoder, Path(folder))
    runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-3), bucket=20_000)

    def loss(index: int, hidden: Tensor) -> Tensor:
        places = torch.arange(30)
        return -runtime.decoder.token_stats(hidden, places, places + 3).logprobs.mean()

    batches = [pack([[1 + i, 2, 3, 4, 5 + rank] * 8], layout.tp) for i in range(3)]
    pipeline, inputs = Pipeline([runtime]), [PipelineInput(runtime, batches, loss)]
    pipeline.train(inputs)
    world.sum(torch.zeros(1))
    assert runtime.optimizer is not None
    runtime.optimizer.release()
    world.clock = clock = Clock(world.device)
    for _ in range(steps):
        pipeline.train(inputs)
    runtime.optimizer.release()
    world.clock = None
    return gathered(world, clock.spans(rank)), stage_records(world, clock)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("traced") / "model")


def test_reductions_run_beside_the_last_backward(folder: Path) -> None:
    found = run_ranks(timed, 2, str(folder), Layout.even(1, 1, 2, 4))
    timeline, records = found[0]
    assert all(answer[0] == timeline for answer in found)
    assert timeline.rows == (0, 1)
    for row in timeline.rows:
        spans = [s for s in timeline.spans if s.row == row]
        ends = max(s.end for s in spans if s.category == "backward")
        starts = [s.start for s in spans if s.name.startswith("reduce-scatter")]
        gathers = [s for s in spans if s.name.startswith("all-gather")]
        assert len(starts) == len(gathers) > 3
        # All but those of the first layers' bucket start before the last backward pass is over.
        assert sum(start < ends for start in starts) >= len(starts) - 1
        # An all-gather starts while the one before it is under way.
        gathers.sort(key=lambda s: s.start)
        assert any(b.start < a.end for a, b in pairwise(gathers))
    (record,) = records
    assert record["name"] == "training.actor"
    assert record["actions"]["backward"] == 3


def test_gathers_run_into_the_next_step(folder: Path) -> None:
    """Layers wait for their own weights: those of the last ones are under way when the next step begins."""
    timeline, _ = run_ranks(timed, 2, str(folder), Layout.even(1, 1, 2, 4), 2)[0]
    for row in timeline.rows:
        spans = [s for s in timeline.spans if s.row == row]
        again = sorted(s.start for s in spans if s.category == "forward")[3]
        first = [s for s in spans if s.name.startswith("all-gather") and s.start < again]
        assert len(first) > 3
        assert sum(s.end > again for s in first) >= len(first) - 1


def test_the_measured_bubble_share_is_that_of_the_timeline(folder: Path) -> None:
    timeline, (record,) = run_ranks(timed, 2, str(folder), Layout.even(1, 2, 1, 4))[0]
    actions = Timeline(tuple(s for s in timeline.spans if s.category != "collective"), "measured")
    assert record["bubble_share"] == pytest.approx(actions.bubble_share(), abs=0.02)
    assert 0 < record["bubble_share"] < 1
    assert record["flushes"] == 1
