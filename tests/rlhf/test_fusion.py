"""PPO through the trainer with models in one stream: what a run apart gives, bitwise; what `auto` chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.config.resolve import resolve
from puzzle.config.run import AlgorithmConfig, TrainConfig
from puzzle.engine.pipeline.pipeline import Pipeline
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.plan.simulate.cost import CostTable
from puzzle.rlhf import fusion
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.models import build_models
from puzzle.rlhf.rollout import compute_scores
from tests.helpers import run_ranks
from tests.rlhf.test_trainer_reference import Bench, Shape, run_all

CASES: list[tuple[str, str, Shape]] = [
    ("whitened", "tied", (1, 2, 1)),
    ("kl in loss", "llama", (1, 2, 1, (3, 1))),
]
TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sharing"))


def test_ppo_is_bitwise_the_same(bench: Bench) -> None:
    cases = []
    for name in CASES:
        for fuse in (False, True, "auto"):
            cases.append(bench.case(*name))
            # Backwards of the second case are split unless it runs apart.
            split = bool(fuse) and name is CASES[1]
            cases[-1].config["intra"] = {
                "fuse_training": fuse,
                "fuse_inference": fuse,
                "split_backward": split,
            }
    found = run_all(cases, 2)
    for start in range(0, len(found), 3):
        apart = found[start]
        for fuse, other in zip((True, "auto"), found[start + 1 : start + 3], strict=True):
            for ours, theirs in zip(apart, other, strict=True):
                assert ours.metrics == theirs.metrics
                assert [e.responses for e in ours.experiences] == [e.responses for e in theirs.experiences]
                assert ours.weights.keys() == theirs.weights.keys() == {"actor", "critic"}
                for role, pieces in ours.weights.items():
                    for (tensor, box, x), (name, same, y) in zip(pieces, theirs.weights[role], strict=True):
                        assert (tensor, box) == (name, same)
                        assert torch.equal(x, y), f"{fuse}: {role} {tensor}"
        stages = [{s["name"]: s for s in watches[0].stages} for watches in found[start : start + 3]]
        inferred = "reference+critic+reward" if start == 0 else "actor+reference+critic"
        assert {"training.actor", "training.critic", "inference.critic"} < set(stages[0]) < {*stages[2], ""}
        for each in stages:
            parts = [bool(s["actions"].get("backward_weight")) for n, s in each.items() if "training" in n]
            assert set(parts) == {start > 0 and each is not stages[0]}
        assert set(stages[1]) == {"generation", "training.actor+critic", f"inference.{inferred}"}
        for watches in found[start : start + 3]:
            simulated = watches[0].simulations
            assert [stage for stage, _ in simulated[:2]] == ["training", "inference"]
            # A stream saves a fill and a drain.
            assert all(0 < seconds["fused"] < seconds["apart"] for _, seconds in simulated)
        for stage, fields in stages[1].items():
            if stage != "generation":
                assert fields["flushes"] == 1
                assert fields["hash"] not in [s["hash"] for s in stages[0].values()]


def config(critic_pp: int, fuse: bool | str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "iterations": 1,
            "batch": 4,
            "device": "cpu",
            "data": {"random_tokens": 4},
            "generation": {"max_new_tokens": 4},
            "actor": {"init": TINY},
            "reward": {"function": None, "init": TINY},
            "layout": {"pp": 2},
            "critic": {"layout": {"pp": critic_pp, "dp": 2 // critic_pp}},
            "intra": {"fuse_training": fuse},
        }
    )


def decided(rank: int) -> list[tuple[bool, list[tuple[str, ...]]]]:
    """What `auto` chooses under three tables of costs; passes as chosen give the results of before."""
    world = World(rank, 2, torch.device("cpu"))
    models = build_models(resolve(config(2, False)), world)
    assert models.by_role["reward"] is not None
    texts = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8]]
    found = []
    pair = [models.by_role[role] for role in ("critic", "reward")]
    for critic, reward in ([(1.0, 5.0), (5.0, 1.0)], [(5.0, 1.0), (1.0, 5.0)], [(0.0, 0.0), (0.0, 0.0)]):
        asked = [compute_scores(m, texts, AlgorithmConfig(microbatch=1)) for m in pair]
        fused = FusedPipeline("auto", pair)
        apart = [
            q.answer(r.results) for q, r in zip(asked, fused.infer([q.input for q in asked]), strict=True)
        ]
        assert fused.undecided
        costs = {"critic": critic, "reward": reward}
        table = CostTable({m: {"forward": seconds, "activation": 0.0} for m, seconds in costs.items()})
        shared = fused.decide(table, train=False)
        again = fused.infer([q.input for q in asked])
        for question, result, before in zip(asked, again, apart, strict=True):
            assert torch.equal(question.answer(result.results), before)
        assert (again[0].schedule is again[1].schedule) is shared
        more = [
            compute_scores(q.input.model, [*texts, *texts[1:]], AlgorithmConfig(microbatch=1)) for q in asked
        ]
        for question, result in zip(more, fused.infer([q.input for q in more]), strict=True):
            (alone,) = Pipeline([question.input.model]).infer([question.input])
            assert torch.equal(question.answer(result.results), question.answer(alone.results))
        found.append((shared, [group.order for group in fused.groups]))
    return found


def test_auto_follows_the_costs() -> None:
    """The model whose first stage is quick goes first (Johnson's rule); without a gain models stay apart."""
    critic, reward = ("critic",) * 4, ("reward",) * 4
    expected = [(True, [critic + reward]), (True, [reward + critic]), (False, [critic, reward])]
    assert run_ranks(decided, 2) == [expected, expected]


def test_what_cannot_share_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"intra.fuse_training: actor has pp=2 and critic has pp=1; give"):
        resolve(config(1, True))
    resolve(config(2, True))
    resolve(config(1, "auto"))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_simulations_are_of_what_ran_last(monkeypatch: pytest.MonkeyPatch, stages: int, train: bool) -> None:
    """Models with tied embeddings meet over the pipeline's ends, where those are not one."""
    layout = SimpleNamespace(pp=stages)
    models: Any = [
        SimpleNamespace(
            name=name,
            placement=SimpleNamespace(layout=layout),
            spec=SimpleNamespace(tied=tied),
            split_backward=True,
        )
        for name, tied in (("actor", True), ("critic", False))
    ]
    monkeypatch.setattr(fusion, "why_not_fused", lambda _: None)
    seen: list[tuple[Any, ...]] = []

    def candidate(name: str, groups: Any, given: Any, num_stages: int, build: Any) -> Any:
        seen.append((name, [group.order for group in groups], given, num_stages, build))
        return name

    seconds = {"apart": 3.0, "fused": 2.0}
    monkeypatch.setattr(fusion, "candidate", candidate)
    monkeypatch.setattr(fusion, "estimate", lambda name, cost: SimpleNamespace(seconds=seconds[name] + cost))
    pipeline: Any = SimpleNamespace(
        train=lambda members, _order, defer: [m.model.name for m in members],
        infer=lambda members, _order: [m.model.name for m in members],
    )
    shared = fusion.FusedPipeline("auto", models, lambda _: pipeline)
    inputs: Any = [
        SimpleNamespace(model=models[1], batches=[0] * 3, most=4),
        SimpleNamespace(model=models[0], batches=[0] * 2, most=None),
    ]
    assert (shared.train if train else shared.infer)(inputs) == ["critic", "actor"]
    assert shared.simulated(0.5, train) == {"apart": 3.5, "fused": 2.5}  # ty: ignore[invalid-argument-type]
    for name, orders, given, num_stages, build in seen:
        assert [(m.name, m.microbatches, m.tied) for m in given] == [
            ("actor", 2, stages > 1),
            ("critic", 4, False),
        ]
        assert num_stages == stages
        assert orders == (
            [("actor",) * 2, ("critic",) * 4] if name == "apart" else [("actor",) * 2 + ("critic",) * 4]
        )
        assert (getattr(build, "keywords", None) == {"split": True}) == train
