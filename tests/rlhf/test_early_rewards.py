"""Rewards that are called for each response begin while other responses are decoded."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from puzzle.cli import main
from puzzle.config.reward import RewardConfig
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import share
from puzzle.engine.runtime.world import World
from puzzle.plan.layout import Layout, Placement
from puzzle.rlhf.rewards.batch import Arriving, RewardBatch
from puzzle.rlhf.rewards.pool import Limits, PoolReward
from puzzle.rlhf.rewards.weighted import Part, WeightedRewards
from puzzle.rlhf.rewards.worker import Setup
from puzzle.rlhf.scoring import Scorer
from puzzle.runlog import load_runs
from tests.helpers import run_ranks
from tests.model.tiny import stage
from tests.reference.tiny import save_lm

MODULE = """
from pathlib import Path
def told(response_ids):
    for ids in response_ids:
        Path(f"scored-{ids[0]}").touch()
    return [float(sum(ids)) for ids in response_ids]
def most(response_ids): return [float(len(response_ids))] * len(response_ids)
"""
WAIT_SECONDS = 60.0


def one(_: int, tokens: Sequence[int]) -> RewardBatch:
    return batch_of([tokens])


def batch_of(tokens: Sequence[Sequence[int]]) -> RewardBatch:
    count = len(tokens)
    texts = ["" for _ in tokens]
    return RewardBatch(texts, texts, [list(t) for t in tokens], [None] * count, texts, [True] * count)


def rewards_in(folder: Path) -> WeightedRewards:
    """A function that is called for each response, in two processes, and one that sees the whole batch."""
    (folder / "early.py").write_text(MODULE)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    each = PoolReward(Setup("early:told", None, 60.0, "reward.response_timeout"), 2, Limits())
    whole = PoolReward(Setup("early:most", None, 60.0, "reward.timeout"), None, Limits())
    return WeightedRewards([Part("told", 1.0, each), Part("most", 0.5, whole)], 300.0)


def await_file(path: Path) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        assert time.monotonic() < until, f"{path} is not scored"
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_what_has_ended_is_scored_while_the_rest_is_decoded(folder: Path) -> None:
    """The last response ends only after all others are scored, which a function after generation never
    could. Scores are those of the batch."""
    decoder = stage(save_lm(folder / "model"))
    lengths = [3, 1, 9, 4]
    requests = [Request([7, 9 + row], row) for row in range(4)]
    params = SamplingParams(max_new_tokens=9, seed=3)
    alone = iter(lengths)

    def rule(_: Sequence[int]) -> Any:
        left = [next(alone)]

        def over(_: int) -> bool:
            left[0] -= 1
            return left[0] == 0

        return over

    rewards = rewards_in(folder)
    scorer = Scorer(World(0, 1, torch.device("cpu")), RewardConfig(), rewards, early=True)
    layout = Layout.even(1, 1, 1, decoder.spec.num_layers)
    placement = Placement.default(layout)
    actor = SimpleNamespace(placement=placement, coord=placement.coord_of(0), rows=range)
    ended: dict[int, list[int]] = {}
    try:
        heard = scorer.listen(cast(Any, actor), 4, one)
        assert heard is not None

        def hear(row: int, tokens: list[int]) -> None:
            # Rows are told by a first token that no other has.
            ended[row] = [1000 + row, *tokens]
            if len(ended) == 4:
                for other in range(4):
                    if other != row:
                        await_file(folder / f"scored-{1000 + other}")
            heard(row, ended[row])

        answers = generate(decoder, requests, params, stop=rule, heard=hear)
        assert [len(answer.tokens) for answer in answers] == lengths
        batch = batch_of([ended[row] for row in range(4)])
        scores = scorer.finish(scorer.begin(lambda: batch), None)
        expected = [sum(ended[row]) + 0.5 * 4 for row in range(4)]
        assert scores.total_B.tolist() == expected
        again = scorer.finish(scorer.begin(lambda: batch), None)
        assert again.total_B.tolist() == expected
    finally:
        rewards.close()


def test_other_replicas_post_what_they_have_ended(folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = run_ranks(replicas, 2, str(folder), store.port, timeout=100.0)
    assert found == [[[6.0 + 1000 + row for row in range(5)]] * 2] * 2


def replicas(rank: int, folder: str, port: int) -> list[list[float]]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    world = World(rank, 2, torch.device("cpu"))
    rewards = WeightedRewards(rewards_in(Path(folder)).parts[:1], 300.0)
    scorer = Scorer(world, RewardConfig(), rewards, early=True)
    placement = Placement.default(Layout.even(1, 1, 2, 2))
    rows = share(5, 2, rank)
    actor = SimpleNamespace(
        placement=placement, coord=placement.coord_of(rank), rows=lambda count: share(count, 2, rank)
    )
    found = []
    for _ in range(2):
        heard = scorer.listen(cast(Any, actor), 5, one)
        assert heard is not None
        for row in reversed(rows):
            heard(row, [1000 + row, 6])
        if not rank:
            for row in range(5):
                await_file(Path(folder) / f"scored-{1000 + row}")
                (Path(folder) / f"scored-{1000 + row}").unlink()
        pending = scorer.begin(lambda: batch_of([[1000 + row, 6] for row in range(5)]))
        found.append(scorer.finish(pending, None).total_B.tolist())
    rewards.close()
    return found


def test_a_run_learns_the_same_from_early_scores(folder: Path) -> None:
    """Two replicas through `puzzle train`: iterations and samples are those of a run that waits."""
    example = Path(__file__).parents[2] / "examples" / "tiny.yaml"
    (folder / "early.py").write_text(MODULE)
    (folder / "p.txt").write_text("".join(f"say {n}\n" for n in range(8)))
    options = [
        "--data.prompts",
        "p.txt",
        "--data.eval_prompts",
        "null",
        "--data.id_field",
        "null",
        "--batch",
        "4",
    ]
    options += ["--iterations", "2", "--eval.every", "0", "--layout.dp", "2", "--log.plots", "false"]
    options += ["--reward.function", "early:told", "--reward.workers", "2", "--checkpoint.save", "false"]
    runs = []
    for early in ("false", "true"):
        more = ["--intra.overlap_rollout", early, "--out", early]
        assert main(["train", "--config", str(example), *options, *more]) == 0
        (run,) = load_runs(folder / early).runs
        samples = (folder / early / "samples.jsonl").read_text()
        runs.append(([i.metrics for i in run.iterations], samples))
    assert runs[0] == runs[1]


def test_a_batch_that_arrives_is_taken_once_and_stops(folder: Path) -> None:
    arriving = Arriving(3)
    taken: list[Any] = []
    readers = [
        threading.Thread(target=lambda: taken.extend(iter(arriving.get, None)), daemon=True) for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    for row in (2, 0, 2, 1):
        arriving.put(row, one(row, [row]))
    for reader in readers:
        reader.join(WAIT_SECONDS)
        assert not reader.is_alive()
    assert sorted(row for row, _ in taken) == [0, 1, 2]
    assert arriving.over
    assert arriving.whole_at is not None
    half = Arriving(2)
    half.put(1, one(1, [5]))
    assert half.whole_at is None
    assert [row for row, _ in half.ready()] == [1]
    waiting = threading.Thread(target=half.get, daemon=True)
    waiting.start()
    half.stop()
    waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive()
