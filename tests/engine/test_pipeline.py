"""One stream of actor and critic gives bitwise the weights of one after the other, on gloo in fp32."""

from __future__ import annotations

import pytest
import torch

from puzzle.engine.pipeline.pipeline import Pipeline
from puzzle.engine.runtime.world import World
from puzzle.plan.pipeline.schedules import PipelineModel, forward_only, one_f_one_b
from tests.engine import pipelines
from tests.engine.pipelines import Case
from tests.helpers import run_ranks

MIXED = ["critic", "actor", "actor", "critic", "critic", "actor", "critic", "critic", "critic"]
SHORT: dict[int, list[Case]] = {
    1: [
        Case((1, 1, 1), (1, 1, 1), rows=5, per_pass=(2, 1)),
        Case((1, 1, 1), (1, 1, 1), rows=2, per_pass=(2, 2), order="alternating", tied=True),
    ],
    2: [
        Case((1, 2, 1), (1, 2, 1), rows=3, per_pass=(3, 3)),
        Case((1, 2, 1, (3, 1)), (1, 2, 1, (1, 4)), rows=6, per_pass=(2, 1), order=MIXED, defer=2),
        Case((1, 2, 1), (1, 2, 1), rows=8, tied=True, split=True),
        Case((1, 1, 2), (2, 1, 1), rows=5, per_pass=(1, 2), order="alternating"),
    ],
    4: [
        Case((1, 4, 1), (1, 4, 1), rows=2),
        Case((1, 4, 1, (1, 2, 1, 1)), (1, 4, 1), rows=9, per_pass=(2, 1), tied=True, split=True),
        Case((2, 2, 1), (1, 2, 2), rows=5, order="alternating", split=True),
        Case((1, 2, 2), (1, 2, 2), rows=7, per_pass=(1, 2), tied=True, split=True),
        Case((1, 2, 2, (1, 3)), (2, 2, 1, (2, 1)), rows=5, per_pass=(3, 1)),
        Case((4, 1, 1), (1, 1, 4), rows=6, per_pass=(2, 1), order="alternating"),
        Case((1, 1, 4), (2, 1, 2), rows=7),
    ],
}
LONG: dict[int, list[Case]] = {
    3: [
        Case((1, 3, 1), (1, 3, 1), rows=m, order=order)
        for m in (1, 2, 3, 8)
        for order in ("sequential", "alternating")
    ],
    8: [
        Case(a, c, rows=rows, per_pass=sizes, order=order, tied=tied, split=tied and a[1] > 1)
        for a, c in (
            ((2, 2, 2), (2, 2, 2)),
            ((1, 4, 2), (2, 4, 1)),
            ((4, 2, 1), (1, 2, 4)),
            ((1, 8, 1), (1, 8, 1)),
            ((1, 1, 8), (2, 1, 4)),
        )
        for rows, sizes in ((8, (1, 1)), (13, (2, 1)), (9, (1, 5)))
        for order in ("sequential", "alternating")
        for tied in (False, True)
    ],
}


def compare(cases: list[Case], world: int) -> None:
    found = run_ranks(pipelines.run, world, world, cases, timeout=900.0)
    for case, answers in zip(cases, zip(*found, strict=True), strict=True):
        for apart, fused, *split in answers:
            for what in ("start", "weights", "norms", "losses", "results"):
                for other in (fused, *split):
                    assert other[what] == apart[what], f"{case}: {what}"
            for ran in (fused, *split):
                assert all(bool(parts) is case.split for _, _, parts in ran["trained"])
            assert apart["weights"]["critic"] != apart["start"]["critic"]
            assert apart["weights"]["actor"] != apart["start"]["actor"]
            assert all(actor > pipelines.CLIP for actor, _ in apart["norms"])
            assert len(apart["trained"]) == len(apart["asked"]) == 2
            for stage in ("trained", "asked"):
                ((flushes, hash_, _),) = fused[stage]
                # A replica with fewer micro-batches than rank 0's may have gaps.
                assert flushes == 1 or (flushes == 2 and apart is not answers[0][0])
                assert sum(n for n, *_ in apart[stage]) == 2
                assert hash_ not in [other for _, other, _ in apart[stage]]


@pytest.mark.parametrize("world", SHORT)
def test_one_stream_gives_bitwise_the_same(world: int) -> None:
    compare(SHORT[world], world)


@pytest.mark.parametrize("split", [False, True])
def test_the_stream_that_was_asked_for_is_the_one_that_runs(split: bool) -> None:
    """Its order, its `defer`, its split backwards; with `most` micro-batches of a larger replica."""
    world = World(0, 1, torch.device("cpu"))
    case = Case((1, 1, 1), (1, 1, 1), rows=4, per_pass=(1, 2))
    made = pipelines.models(world, case)
    for runtime in made:
        runtime.split_backward = split
    rows = pipelines.texts(case.rows)
    passes = [pipelines.work(runtime, rows, size) for runtime, size in zip(made, case.per_pass, strict=True)]
    stream, seen = Pipeline(made), set()
    models = (PipelineModel("actor", 4), PipelineModel("critic", 2))
    mixed = ["critic", "actor", "actor", "critic", "actor", "actor"]
    for order in ("sequential", "alternating", mixed):
        for defer in (1, 2, 3):
            (result, *_) = stream.train(passes, order, defer)
            assert (
                result.schedule.hash
                == one_f_one_b(models, 1, order, optimizer=True, split=split, defer=defer).hash
            )
            seen.add(result.schedule.hash)
        (result, *_) = stream.infer(passes, order)
        assert result.schedule.hash == forward_only(models, 1, order).hash
    assert len(seen) >= 5, "orders and values of `defer` give other streams"


@pytest.mark.long
@pytest.mark.parametrize("world", LONG)
def test_every_split(world: int) -> None:
    compare(LONG[world], world)


def test_replicas_without_rows_let_the_others_answer() -> None:
    """One text: of two pipelines the second is idle, but its ranks make the groups of all channels, too."""
    found = run_ranks(pipelines.few, 4, 4, Case((1, 2, 2), (1, 2, 2), rows=1), timeout=60.0)
    assert [[len(way) for way in answers] for answers in found] == [[0, 0], [0, 0], [2, 2], [0, 0]]
    apart, fused = found[2]
    assert all(map(torch.equal, apart, fused))


def test_models_of_other_pipelines_are_refused() -> None:
    lines = run_ranks(pipelines.refusal, 4, Case((1, 4, 1), (2, 2, 1)))
    assert set(lines) == {"actor and critic cannot share a pipeline: actor has pp=4 and critic has pp=2"}
