"""Prompts of a stand-in for reasoning-gym (with the package itself: tests/rlhf/test_verifiers.py)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from puzzle.data.gym import gym_prompts
from puzzle.errors import UserError


def create_dataset(task: str, size: int = 1, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    assert options.get("terms", 2) > 1, "terms must\n be above 1"
    answers: dict[str, Any] = {"sums": "7", "sets": {3}, "pairs": (1, 2)}
    return [
        {"question": f"{task} {row} of {seed}", "answer": answers[task], "metadata": {"row": row, **options}}
        for row in range(size)
    ]


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    gym: Any = ModuleType("reasoning_gym")
    factory: Any = ModuleType("reasoning_gym.factory")
    gym.get_score_answer_fn = lambda task: lambda answer, entry: float(answer == entry["answer"] == (1, 2))
    factory.DATASETS = dict.fromkeys(("sums", "sets", "pairs"))
    factory.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def test_rows_are_of_task_options_seed_and_number() -> None:
    assert list(gym_prompts("sums", 3, 5, {"terms": 4})) == [
        {"prompt": f"sums {row} of 5", "answer": "7", "metadata": {"row": row, "terms": 4}}
        for row in range(3)
    ]


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("products", {}, "products: reasoning-gym has no such task; it has pairs, sets, sums$"),
        ("sums", {"terms": 1}, "sums: reasoning-gym does not take these options: terms must be above 1"),
        ("sums", {"size": 2}, "sums: reasoning-gym does not take these options: .*size"),
        ("sets", {}, "sets: row 0 is no JSON: .*set"),
        ("pairs", {}, "pairs: its answers are judged by what JSON cannot hold"),
    ],
)
def test_what_it_does_not_give_is_one_line(task: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        list(gym_prompts(task, 1, 0, options))
    assert "\n" not in str(error.value)
