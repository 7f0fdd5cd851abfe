"""`puzzle evaluate`: estimators against all subsets, samples against `puzzle generate`, layouts, refusals."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from itertools import combinations
from math import isclose
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.cli import main
from puzzle.data.prompts import Prompt
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.errors import UserError
from puzzle.rlhf.estimators import majority_at, pass_at
from puzzle.rlhf.evaluation import Evaluation, summary, table
from puzzle.rlhf.rewards.builtin import letter_share, said_answer
from puzzle.rlhf.scoring import Scores
from tests.cli.test_hostile import refused
from tests.reference.tiny import save_lm, save_value


@given(
    answers=st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), right=st.sets(st.sampled_from("abcd"))
)
def test_estimators_are_means_over_all_subsets(answers: list[str], right: set[str]) -> None:
    good = [answer in right for answer in answers]
    for k in range(1, len(answers) + 1):
        subsets = list(combinations(answers, k))
        passed = fmean(any(answer in right for answer in subset) for subset in subsets)
        assert isclose(pass_at(sum(good), len(good), k), passed, abs_tol=1e-12)
        voted = []
        for subset in subsets:
            most = max(Counter(subset).values())
            winners = [answer for answer, count in Counter(subset).items() if count == most]
            voted.append(fmean(answer in right for answer in winners))
        assert isclose(majority_at(answers, good, k), fmean(voted), abs_tol=1e-12)


def test_an_answer_is_right_or_wrong_not_both() -> None:
    with pytest.raises(ValueError, match="right and wrong"):
        majority_at(["a", "a"], [True, False], 2)


def test_answers_in_one_spelling() -> None:
    same = ["so it is 1/2", "0.5", r"\boxed{ 0.50 }", "first 3, then $0.5$"]
    assert {said_answer(text) for text in same} == {"1/2"}
    assert said_answer("Paris ") == said_answer("paris")


def test_the_interval_is_over_prompts() -> None:
    scores = torch.tensor([1.0, 3.0, 0.0, 0.0, 5.0, 3.0])
    found = summary(Scores(scores), ["x"] * 6, 2, [1, 2, 3, 4, 5, 3], [True] * 5 + [False])
    assert found["reward"] == 2.0
    assert found["reward_ci95"] == pytest.approx(1.96 * stdev([2.0, 0.0, 4.0]) / 3**0.5)
    assert found["response_length"] == 3.0
    assert found["truncated_frac"] == pytest.approx(1 / 6)
    assert "pass@1" not in found, "no scores of right and wrong"
    assert "2.0000 +- " in table(found, 3, 2)


def test_the_majority_is_of_answers() -> None:
    """Three wrong answers that differ do not outvote two right ones that are spelled apart."""
    said = ["it is 4", "four", "5", "6", "7"]
    found = summary(Scores(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])), said, 5, [1] * 5, [True] * 5)
    assert found["pass@1"] == found["maj@1"] == pytest.approx(0.4)
    assert found["pass@4"] == 1.0
    assert found["maj@4"] == pytest.approx(fmean([1.0, 1.0, 1.0, 0.25, 0.25]))
    assert "pass@8" not in found


@pytest.mark.parametrize(("vocabulary", "positions"), [(10, 13), (9, 13), (10, 12), (99, 99)])
def test_prompts_that_the_actor_cannot_read_or_answer_are_refused(vocabulary: int, positions: int) -> None:
    """By the largest token and the longest prompt of all, not of the first: 9, and 5 with 8 to come."""
    evaluation = Evaluation.__new__(Evaluation)
    prompts = [(3, 1), (1, 2, 3, 4, 5), (9,), (2, 2)]
    evaluation.prompts = tuple(Prompt(n, str(n), "", None, tokens) for n, tokens in enumerate(prompts))
    spec = SimpleNamespace(vocab_size=vocabulary, max_positions=positions)
    evaluation.actor = SimpleNamespace(spec=spec)  # ty: ignore[invalid-assignment]
    generation = SimpleNamespace(max_new_tokens=8)
    evaluation.config = SimpleNamespace(generation=generation)  # ty: ignore[invalid-assignment]
    words = {9: "token 9, the actor's vocabulary has 9", 12: "5 prompt and 8 new tokens exceed its 12 "}
    said = words.get(vocabulary) or words.get(positions)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        evaluation._check()


def test_the_table_has_intervals_beside_their_means() -> None:
    found = {"reward": 0.5, "reward_ci95": 0.125, "pass@1": 1.0, "response_length": 12.25}
    assert table(found, 3, 2).splitlines() == [
        "3 prompts, 2 responses each",
        "  reward                  0.5000 +- 0.1250",
        "  pass@1                  1.0000",
        "  response_length        12.2500",
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_lm(tmp_path / "lm")
    save_value(tmp_path / "judge")
    for name in ("lm", "judge"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": f"{n} plus {n} is", "answer": str(2 * n)} for n in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


WORDS = ["--prompts", "prompts.jsonl", "--device", "cpu", "--generation.max_new_tokens", "8", "--batch", "2"]


def samples(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "samples.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("folder")
def test_answers_are_those_of_rollouts_in_every_layout() -> None:
    """Sample 0 is what `puzzle generate` draws with the same seed; two replicas find the same."""
    reward = ["--reward.functions", '[{"function": "puzzle.rlhf.rewards:letter_share"}]']
    reward += ["--reward.model", "judge", "--reward.weight", "0.5"]
    words = ["evaluate", "lm", *WORDS, "--samples", "3", "--seed", "4"]
    assert main([*words, *reward, "--out", "one"]) == 0
    generate = ["generate", "lm", "--prompts", "prompts.jsonl", "--max-new-tokens", "8", "--seed", "4"]
    assert main([*generate, "--device", "cpu", "--jsonl", "drawn.jsonl"]) == 0
    drawn = [json.loads(line)["response"] for line in Path("drawn.jsonl").read_text().splitlines()]
    assert [row["response"] for row in samples("one") if row["sample"] == 0] == drawn
    assert main([*words, *reward, "--layout.dp", "2", "--out", "two"]) == 0
    one, two = samples("one"), samples("two")
    assert len(one) == 15
    for a, b in zip(one, two, strict=True):
        assert (a["prompt_id"], a["response"]) == (b["prompt_id"], b["response"])
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)
        assert a["reward"] == pytest.approx(
            a["rewards"]["letter_share"] + 0.5 * a["rewards"]["model"], abs=1e-5
        )
    told = json.loads(Path("one/evaluation.json").read_text())
    assert told["metrics"]["reward"] == pytest.approx(fmean(row["reward"] for row in one), abs=1e-6)
    assert told["config"]["seed"] == 4


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", ["none", "function", "model"])
def test_rewards_are_asked_as_far_as_there_are_any(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A function alone needs no model, and without either there are answers all the same."""
    options = {
        "none": [],
        "function": ["--reward.function", "puzzle.rlhf.rewards:letter_share", "--reward.workers", "0"],
        "model": ["--reward.model", "judge"],
    }[kind]
    assert main(["evaluate", "lm", *WORDS, "--samples", "2", *options, "--out", kind]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "5 prompts, 2 responses each"
    assert "samples.jsonl" not in said.out
    assert f"{kind}: evaluation.json, samples.jsonl\n" in said.err
    rows = samples(kind)
    assert [row["sample"] for row in rows] == [0, 1] * 5
    assert all(("reward" in row) == (kind != "none") for row in rows)
    metrics = json.loads(Path(kind, "evaluation.json").read_text())["metrics"]
    assert ("reward" in metrics) == (kind != "none")
    if kind == "function":
        shares = letter_share([], [row["response"] for row in rows])
        assert [row["reward"] for row in rows] == pytest.approx(shares, abs=1e-6)
    if kind == "model":
        assert len({row["reward"] for row in rows}) > 1


BAD = [
    (["evaluate", "lm"], "data.prompts is missing"),
    (["evaluate", *WORDS], "actor: give a model folder"),
    (["evaluate", "absent", *WORDS], "absent: no such folder"),
    (["evaluate", "lm", "--prompts", "absent.jsonl", "--device", "cpu"], "absent.jsonl: no such file"),
    (["evaluate", "lm", *WORDS, "--reward", "puzzle.rlhf.rewards:absent"], "absent"),
    (["evaluate", "lm", *WORDS, "--samples", "0"], "from 1 to 1048576"),
    (
        ["evaluate", "lm", *WORDS[:-4], "--generation.max_new_tokens", "250"],
        "lower generation.max_new_tokens",
    ),
    (["evaluate", "lm", *WORDS, "--layout.tp", "3"], "layout.tp=3 does not divide"),
    (["evaluate", "lm", *WORDS, "--nonsense", "3"], "--nonsense: unknown option"),
    (["evaluate", "lm", *WORDS, "--out", "there"], "holds an evaluation already"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_words_are_refused_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there").mkdir()
    Path("there/evaluation.json").write_text("{}")
    refused(lambda: main(words), said, capsys)
