"""PPO resumed in another layout has the same tokens and losses, in the same layout the same bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import run_ranks
from tests.rlhf import resumed_ranks
from tests.rlhf.ppo_ranks import Case, Watch
from tests.rlhf.test_trainer_reference import Bench, Shape

SOURCE = (2, 2, 1)
SAVED, ITERATIONS = 2, 4
LAYOUTS: list[Shape] = [
    (1, 1, 3),
    {"actor": (1, 2, 1), "critic": (2, 1, 1), "reference": (1, 1, 2), "reward": (1, 2, 1)},
]
LONG: list[Shape] = [
    (1, 1, 1),
    (4, 1, 1),
    (1, 2, 1, (3, 1)),
    (2, 1, 2),
    {
        "actor": (1, 2, 2),
        "generation": (4, 1, 1),
        "critic": (2, 1, 2),
        "reference": (2, 2, 1),
        "reward": (1, 4, 1),
    },
]


QUEUES: list[tuple[Shape, int]] = [((1, 2, 1), 1), ((1, 1, 2), 3)]
LONG_QUEUES: list[tuple[Shape, int]] = [
    (shape, most)
    for shape in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2))
    for most in (1, 3)
    if (shape, most) not in QUEUES
]


class Runs:
    """A run left alone, its checkpoint, and runs that go on from there."""

    def __init__(self, base: Path) -> None:
        self.base, self.bench = base, Bench(base)
        self.alone = self.run(SOURCE, base / "alone", SAVED)

    def case(self, shape: Shape, most: int | None = None) -> Case:
        case = self.bench.case("plain", "tied", shape)
        case.config.update(iterations=ITERATIONS, batch=6)
        case.config["algorithm"] |= {"minibatch": 3, "epochs": 2, "reward_norm": True, "kl": {"target": 0.1}}
        case.config["generation"] |= {"samples": 2, "min_new_tokens": 2, "max_sequences": most}
        return replace(case, stop_ids=tuple(range(0, 259, 8)))

    def run(self, shape: Shape, folder: Path, save_at: int = 0, most: int | None = None) -> list[Watch]:
        tp, pp, dp = (shape["actor"] if isinstance(shape, dict) else shape)[:3]
        world = tp * pp * dp
        return run_ranks(resumed_ranks.run, world, world, self.case(shape, most), str(folder), save_at)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize(
    "shape", [*LAYOUTS, *(pytest.param(s, marks=pytest.mark.long) for s in LONG)], ids=str
)
def test_other_layouts_go_on_with_the_same_tokens_and_losses(
    runs: Runs, tmp_path: Path, shape: Shape
) -> None:
    folder = Path(shutil.copytree(runs.base / "alone", tmp_path / "again"))
    again, alone = runs.run(shape, folder)[0], runs.alone[0]
    # Without near ties: the rule of `same_tokens` asks for equal rows elsewhere.
    ours, theirs = ([e.responses for e in watch.experiences] for watch in (again, alone))
    assert ours == theirs[SAVED:]
    for found, expected in zip(again.metrics, alone.metrics[SAVED:], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            if name.endswith("_loss"):
                assert abs(found[name] - expected[name]) <= 1e-5, name
        spread = {"balance": found["balance"]}  # of replicas, which each layout has its own number of
        assert found == pytest.approx({**expected, **spread}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "most"), [*QUEUES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_QUEUES)]
)
def test_a_queue_goes_on_with_the_same_tokens(runs: Runs, tmp_path: Path, shape: Shape, most: int) -> None:
    """All at a time before, few at a time after: groups, stops and least lengths as in the run alone."""
    folder = Path(shutil.copytree(runs.base / "alone", tmp_path / "again"))
    again, alone = runs.run(shape, folder, most=most)[0], runs.alone[0]
    ours, theirs = ([e.responses for e in watch.experiences] for watch in (again, alone))
    assert len(ours) == ITERATIONS - SAVED
    assert ours == theirs[SAVED:]
    lengths = {len(response) for responses in ours for response in responses}
    assert min(lengths) >= 2
    assert len(lengths) > 1


def test_the_same_layout_gives_the_same_bits(runs: Runs, tmp_path: Path) -> None:
    twice = runs.run(SOURCE, tmp_path / "twice", SAVED)
    resumed = runs.run(SOURCE, Path(shutil.copytree(runs.base / "alone", tmp_path / "again")))
    for others, first in ((twice, 0), (resumed, SAVED)):
        for ours, theirs in zip(others, runs.alone, strict=True):
            assert ours.metrics == theirs.metrics[first:]
            for role, pieces in theirs.weights.items():
                for (name, place, values), (name2, place2, values2) in zip(
                    pieces, ours.weights[role], strict=True
                ):
                    assert (name, place) == (name2, place2)
                    assert torch.equal(values, values2), f"{role} {name}"
