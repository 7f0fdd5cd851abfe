"""A run resolved before it starts: the plan says what runs where, and equal plans have equal hashes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import plan_switch
from puzzle.rlhf.preflight import agree
from puzzle.spec.model import ModelSpec
from tests.helpers import run_ranks

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BASE: dict[str, Any] = {
    "iterations": 3,
    "batch": 6,
    "layout": {"tp": 1, "pp": 4, "dp": 1},
    "actor": {"init": TINY},
    "reward": {"init": {**TINY, "num_hidden_layers": 5}},
    "data": {"random_tokens": 8},
    "generation": {"samples": 2, "max_new_tokens": 4, "layout": {"tp": 2, "pp": 2}},
    "algorithm": {"epochs": 2, "minibatch": 4},
}


def configured(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**BASE, **changes})


def test_adapters_are_no_wider_than_the_model() -> None:
    def spec(rank: int) -> ModelSpec:
        return resolve(configured(actor={"init": TINY, "lora": {"rank": rank}})).models["actor"].spec

    assert spec(16).lora is not None
    with pytest.raises(UserError, match="no matrix of the model has more than 16"):
        spec(17)


def test_a_folder_of_adapters_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="it is not a Hugging Face model folder but adapters, which are added"
    ):
        resolve(configured(actor={"model": str(tmp_path)}))


def test_a_plan_says_what_runs_where() -> None:
    plan = resolve(configured())
    assert list(plan.models) == ["actor", "critic", "reference", "reward"]
    assert [role for role, model in plan.models.items() if model.trained] == ["actor", "critic"]
    assert plan.models["reward"].layout.stage_layers == (2, 1, 1, 1)
    assert {role: model.spec.head for role, model in plan.models.items()} == {
        "actor": "lm",
        "critic": "value",
        "reference": "lm",
        "reward": "value",
    }
    assert plan.generation.layout == Layout(2, 2, 1, (2, 2))
    assert plan.training.roles == ("actor", "critic")
    assert plan.inference.roles == ("reference", "critic", "reward")
    # 6 prompts x 2 samples in minibatches of 4, twice over: 6 steps in each of 3 iterations.
    assert (plan.batch.sequences, plan.batch.steps, plan.batch.all_steps) == (12, 6, 18)
    assert all(str(model.layout) in plan.table() for model in plan.models.values())


def test_the_switch_is_what_its_planner_says_of_the_same_question() -> None:
    plan = resolve(configured(switch={"staging_bytes": 1 << 10, "strategy": "fixed-order"}), 2)
    assert plan.switch is not None
    by_hand = plan_switch(
        plan.actor.spec,
        Placement.default(Layout(1, 4, 1, (1, 1, 1, 1))),
        Placement.default(Layout(2, 2, 1, (2, 2))),
        Cluster(2),
        strategy="fixed-order",
        itemsize=4,
        staging_bytes=1 << 10,
    )
    assert plan.switch.plan.hash == by_hand.hash
    assert plan.switch.plan is plan.switch.plan
    assert resolve(configured(generation={"samples": 2, "max_new_tokens": 4})).switch is None


def test_what_launchers_know_counts_unless_it_was_given() -> None:
    assert resolve(configured(), 2).cluster == Cluster(2)
    assert resolve(configured(switch={"gpus_per_node": 1}), 2).cluster == Cluster(1)
    assert resolve(configured()).cluster == Cluster(4)


def test_equal_runs_have_equal_hashes_and_others_have_not() -> None:
    first = resolve(configured(), 4)
    assert resolve(configured(), 4).hash == first.hash
    others = [
        resolve(configured(), 2),
        resolve(configured(seed=1), 4),
        resolve(configured(actor={"init": TINY, "optimizer": {"lr": 2e-5}}), 4),
        resolve(configured(generation={"max_new_tokens": 4, "samples": 2}), 4),
    ]
    assert len({first.hash, *(plan.hash for plan in others)}) == 1 + len(others)


def _agree(rank: int, seeds: list[int]) -> str:
    try:
        agree(resolve(configured(seed=seeds[rank])), World(rank, len(seeds), torch.device("cpu")))
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(("seeds", "word"), [([0, 0], "agreed"), ([0, 1], "rank 1 resolved the run to plan")])
def test_ranks_that_resolve_a_run_differently_do_not_start_it(seeds: list[int], word: str) -> None:
    assert all(found.startswith(word) for found in run_ranks(_agree, 2, seeds))
