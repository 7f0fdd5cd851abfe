"""Rewards of answers that can be judged, and prompts that come with them."""

import json
import sys
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.data.gym import gym_prompts
from puzzle.errors import UserError
from puzzle.rlhf import verifiers
from puzzle.rlhf.rewards import exact_answer
from puzzle.rlhf.rewards.functions import FunctionReward

RIGHT = [
    ("so it is 42.", "42"),
    ("so it is 42", 42),
    ("first 7, then 1,234.50", "1234.5"),
    ("= 0.5", "1/2"),
    (r"\boxed{\frac{1}{2}} = 0.5", r"\frac{1}{2}"),
    (r"\boxed{7} and then 8", "7"),
    (r"\boxed{1} no: \boxed{ 2 }", 2.0),
    ("10 - 3 = 7 ... -7", "-7"),
    ("from 5-3 comes 3", "3"),
    ("\u22124", "-4"),
    ("$72", "Natalia sold 48 + 24 = 72 clips.\n#### 72"),
    (r"\boxed{Paris}", "paris"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    ("1000000", "1,000,000"),
    ("3/4", 0.75),
]
WRONG = [
    ("so it is 43.", "42"),
    ("", "42"),
    ("forty-two", "42"),
    ("42 or 41", "42"),
    (r"\boxed{42", "41"),
    (r"\boxed{41} 42", "42"),
    ("1/0", "1"),
    ("5-3", "-3"),
    ("9" * 5000, "9"),
    (r"\boxed{London}", "paris"),
    ("Paris", "paris"),
    ("12", "1"),
]


@pytest.mark.parametrize(("cases", "score"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_exact_answers(cases, score) -> None:
    for response, answer in cases:
        assert exact_answer([response], [answer]) == [score], (response, answer)
    reward = FunctionReward("puzzle.rlhf.rewards:exact_answer")
    assert reward.columns(["answer", "prompt"], "data") == ["answer"]
    with pytest.raises(UserError, match="'answer' is neither"):
        reward.columns(["prompt"], "data")


@pytest.mark.parametrize(
    ("function", "package"), [("math_verify", "math-verify"), ("reasoning_gym", "reasoning-gym")]
)
def test_without_the_package_a_line_names_the_extra(monkeypatch, function, package) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    for cached in (verifiers._math_verify, verifiers._gym_task):
        cached.cache_clear()
    words = f"verifiers:{function}: the package {package} is not installed; it is of the extra verifiers"
    columns: list[list[Any]] = [["1"], ["1"]]
    if function == "reasoning_gym":
        columns += [[{"source_dataset": "chain_sum"}], ["p"]]
    with pytest.raises(UserError, match=words):
        getattr(verifiers, function)(*columns)
    if function == "reasoning_gym":
        with pytest.raises(UserError, match="reasoning-gym is not installed; it is of the extra verifiers"):
            list(gym_prompts("chain_sum", 1, 0, {}))


def test_math_verify_compares_values() -> None:
    pytest.importorskip("math_verify")
    cases = [
        (r"Hence $x = \frac{2}{4}$.", "0.5", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"The answer is 12", 12, 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{13}", 12, 0.0),
        ("I do not know", "3", 0.0),
    ]
    responses, answers, scores = map(list, zip(*cases, strict=True))
    assert verifiers.math_verify(responses, answers) == scores


def test_a_task_of_reasoning_gym_makes_and_judges_prompts(tmp_path, monkeypatch, capsys) -> None:
    """As a command writes them and a run reads them: its own answers score 1, others do not."""
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    options = ["--task", "chain_sum", "--count", "5", "--seed", "3", "--options", '{"max_terms": 3}']
    assert main(["prompts", "sums.jsonl", *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    ours = gym.create_dataset("chain_sum", size=5, seed=3, max_terms=3)
    assert [(row["prompt"], row["answer"]) for row in rows] == [(e["question"], e["answer"]) for e in ours]
    prompts, answers, metadata = ([row[key] for row in rows] for key in ("prompt", "answer", "metadata"))
    tagged = [f"I think so.\n<answer>{answer}</answer>" for answer in answers]
    assert verifiers.reasoning_gym(tagged, answers, metadata, prompts) == [1.0] * 5
    assert verifiers.reasoning_gym(answers, answers, list(map(json.dumps, metadata)), prompts) == [1.0] * 5
    wrong = [f"<answer>{answer}0</answer>" for answer in answers]
    assert max(verifiers.reasoning_gym(wrong, answers, metadata, prompts)) < 1
    with pytest.raises(ValueError, match="names no task"):
        verifiers.reasoning_gym(["1"], ["1"], [{}], ["p"])
    for more, words in [
        (["--task", "no_such"], "no_such: reasoning-gym has no such task; it has "),
        (
            ["--task", "chain_sum", "--options", '{"min_terms": 0}'],
            "reasoning-gym does not take these options",
        ),
        (["--task", "arc_agi", "--count", "1"], "judged by what JSON cannot hold"),
    ]:
        capsys.readouterr()
        assert main(["prompts", "other.jsonl", *more]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
        assert not (tmp_path / "other.jsonl").exists()


def test_an_answer_that_math_verify_cannot_read_is_compared_as_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row by row, and the others by what the package says."""
    read: list[str] = []

    def parse(text: str, parsing_timeout: int) -> list[str]:
        read.append(text)
        return [] if "odd" in text else [text.strip("$")]

    def verify(gold: list[str], said: list[str], timeout_seconds: int) -> bool:
        return gold == said

    monkeypatch.setattr(verifiers, "_math_verify", lambda: (parse, verify))
    responses, answers = ["4", "odd 5", "odd 6", "7"], ["4", "odd #### 5", "odd #### 7", "$8$"]
    assert verifiers.math_verify(responses, answers) == [1.0, 1.0, 0.0, 0.0]
    assert read == ["$4$", "4", "$odd #### 5$", "$odd #### 7$", "$8$", "7"]
