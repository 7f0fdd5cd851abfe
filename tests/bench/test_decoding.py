"""Decode passes that are timed are those that are meant: so many rows, behind so many tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.bench import decoding, device
from puzzle.bench.calibrate import CalibrateBench
from puzzle.bench.pieces import STEPS, Found, PiecesBench
from puzzle.engine.runtime.world import World
from puzzle.plan.predict.tables import Shape
from puzzle.spec.model import ModelSpec

SPEC = ModelSpec("llama", 64, 32, 48, 4, 4, 2, 8)


@pytest.fixture
def bench(tmp_path: Path) -> PiecesBench:
    return CalibrateBench(
        models=("350m",),
        dtype="fp32",
        device="cpu",
        out=tmp_path / "c.json",
        rows=(2, 3),
        prompts=(5, 9),
        tokens=(8,),
    )


def test_rows_go_on_behind_their_prompts(bench: PiecesBench) -> None:
    """Every time anew; what passes read and write is the rows' own."""
    with World.start("cpu") as world:
        model = decoding.Answers(bench, world, SPEC, 1)
        with model.runner(9, graphs=False) as runner:
            for rows in (3, 2):
                assert model.passes(runner, rows, 9) > 0
                assert runner.state[1].tolist()[:rows] == [9 + STEPS] * rows
                pages = runner.table[:rows].flatten().tolist()
                assert len(set(pages)) == len(pages)
                assert min(pages) > 0, "page 0 belongs to nobody"
            assert runner.table.shape[0] == 3, "rows of the most passes"
        with model.runner(9, graphs=False) as runner:
            assert model.recording(runner, 2, 9) == 0, "nothing is recorded here"
            assert runner.state[1].tolist()[:2] == [10, 10]


def test_layers_and_the_rest_are_the_whole(bench: PiecesBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of three layers take what a row says of them, whatever half of them take."""
    asked = []

    def step(self: decoding.Answers, rows: int, prompt: int, later: int) -> float:
        asked.append((self.spec.num_layers, rows, prompt))
        return 1e-3 * self.spec.num_layers * rows + 1e-5 * prompt

    monkeypatch.setattr(decoding.Answers, "step", step)
    found = Found()
    with World.start("cpu") as world:
        list(decoding.decodes(bench, world, found, replace(SPEC, num_layers=3), 1))
    assert {layers for layers, _, _ in asked} == {3, 1}
    for row, (prompt, rows) in zip(found.decodes, [(5, 2), (5, 3), (9, 2), (9, 3)], strict=True):
        assert (row.shape, row.rows, row.cached) == (Shape.of(SPEC), rows, prompt + 1 + STEPS / 2)
        assert (row.graph_s, row.graph_rest_s) == pytest.approx((1e-3 * rows, 1e-5 * prompt))
        assert (row.eager_s, row.eager_rest_s) == (row.graph_s, row.graph_rest_s)
    assert found.capture == 0


def test_lanes_of_a_cpu_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median, after runs that warm up; what comes before is not timed."""
    clock, done = [0.0], []
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def work() -> None:
        done.append("work")
        clock[0] += 100.0 if len(done) < 5 else len(done)

    def before() -> None:
        done.append("before")
        clock[0] += 1000.0

    with World.start("cpu") as world:
        assert device.lanes(world, work, 3, before) == (8.0, 8.0)
    assert done == ["before", "work"] * 5
