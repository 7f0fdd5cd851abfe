import json
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from puzzle.config.load import load_config, load_given
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import RewardModelConfig, SFTConfig
from puzzle.data.prepare import prepare
from puzzle.rlhf.requirements import check_files
from puzzle.rlhf.rewards import exact_answer

ROOT = Path(__file__).parents[2]


def records(name: str) -> list[dict[str, str]]:
    lines = (ROOT / "examples/prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_held_out_prompts_are_of_other_topics():
    train, held_out = records("sentiment-train"), records("sentiment-held-out")
    assert len(train) >= 200
    assert len(held_out) >= 64
    assert not {r["topic"] for r in train} & {r["topic"] for r in held_out}
    for key in ("id", "prompt"):
        assert len({r[key] for r in train + held_out}) == len(train) + len(held_out)
    assert all(r["prompt"] == r["prompt"].strip() for r in train + held_out)


def test_openings_are_neutral():
    """What the model is to learn must not already be in the prompts."""
    from puzzle.rlhf.rewards import vader_sentiment

    pytest.importorskip("vaderSentiment")
    for name in ("sentiment-train", "sentiment-held-out"):
        scores = vader_sentiment([], [r["prompt"] for r in records(name)])
        assert abs(sum(scores) / len(scores)) < 0.1


def test_the_tiny_example_is_ready_to_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(Path("examples/tiny.yaml"))
    check_files(config)
    specs = {role: model.spec for role, model in resolve(config).models.items()}
    assert (specs["critic"].num_layers, specs["critic"].head) == (2, "value")
    assert (specs["actor"].num_kv_heads, specs["actor"].num_heads) == (2, 8)
    data = prepare(config, specs["actor"].vocab_size)
    assert data.held_out is not None
    assert len(data.held_out.prompts) == 80


def test_the_learning_example_asks_for_its_model_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(Path("examples/smollm2-sentiment.yaml"), ["--seed", "2"])
    assert config.critic is not None
    assert config.actor.model == config.critic.model == config.reference.model == "models/smollm2"
    assert (config.critic.layers, config.reference.layers) == (6, None)
    assert config.minibatch == 16


def test_sums_are_right_and_those_held_out_are_others():
    train, held_out = records("arithmetic-train"), records("arithmetic-held-out")
    for record in train + held_out:
        shown, asked = record["prompt"].split("\n")
        assert eval(shown.replace("=", "==")) is True
        assert eval(f"{asked}= {record['answer']}") is True
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-ppo"])
def test_examples_of_sums_ask_for_their_model_alone(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    config = load_config(Path(f"examples/{name}.yaml"))
    assert config.actor.model == "models/smollm2"
    assert (config.critic is None) == (config.algorithm.name == "grpo")
    assert config.batch * config.generation.samples == 64
    assert config.reward.function == f"{exact_answer.__module__.rpartition('.')[0]}:exact_answer"
    assert exact_answer([" 37", " 38"], ["37", "37"]) == [1.0, 0.0]


def test_the_three_steps_fit_one_another(tmp_path, monkeypatch):
    """Each step reads what the one before wrote; what is held out asks about other things."""
    folder = ROOT / "examples/three-steps"
    monkeypatch.chdir(tmp_path)
    made = run_path(str(folder / "data.py"))
    made["main"](Path("runs/three-steps/data"))
    things = made["THINGS"]
    steps: dict[str, Any] = {
        task: load_given(schema, folder / f"{task}.yaml")[0]
        for task, schema in (("sft", SFTConfig), ("reward-model", RewardModelConfig), ("ppo", TrainConfig))
    }
    for config in steps.values():
        check_files(config)
        assert config.data.system == "Answer in one sentence."
    assert steps["sft"].actor.model == "models/smollm2"
    tuned = "runs/three-steps/sft/checkpoints/last"
    assert steps["reward-model"].reward.model == steps["ppo"].actor.model == tuned
    assert steps["ppo"].reward.model == "runs/three-steps/reward/checkpoints/last"
    for name in ("chats", "pairs", "prompts"):
        asked = {}
        for kind in ("", "-held-out"):
            text = Path(f"runs/three-steps/data/{name}{kind}.jsonl").read_text()
            asked[kind] = {thing for thing in things if f" {thing}" in text}
        assert len(asked[""]) > 40
        assert len(asked["-held-out"]) > 20
        assert not asked[""] & asked["-held-out"]
    rows = [json.loads(line) for line in Path("runs/three-steps/data/pairs.jsonl").read_text().splitlines()]
    assert {row["preference"] for row in rows} == {"synthetic"}
