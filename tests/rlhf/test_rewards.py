import sys

import pytest

from puzzle.errors import UserError
from puzzle.rlhf.rewards import FunctionReward

MODULE = """
import numpy
def lengths(prompts, responses): return [len(p) + len(r) for p, r in zip(prompts, responses)]
def array(prompts, responses): return numpy.ones(len(responses), dtype=numpy.float32)
def fails(prompts, responses): return [1 / 0]
def short(prompts, responses): return [1.0]
def nan(prompts, responses): return [1.0, float("nan")]
def infinite(prompts, responses): return [1.0, float("inf")]
def words(prompts, responses): return ["good", "bad"]
def nothing(prompts, responses): return None
constant = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_scorers.py").write_text(MODULE)
    yield
    sys.modules.pop("own_scorers", None)


def test_functions_of_the_working_directory():
    assert FunctionReward("own_scorers:lengths")(["ab", "c"], ["d", "efg"]) == [3.0, 4.0]
    assert FunctionReward("own_scorers:array")(["ab", "c"], ["d", "efg"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"own_scorers:fails raised ZeroDivisionError: division by zero \(.*scorers\.py:5\)"),
        ("short", "gave 1 scores for 2 responses"),
        ("nan", "gave nan for the response 'second'"),
        ("infinite", "gave inf for the response 'second'"),
        ("words", "gave 'good' for the response 'first'"),
        ("nothing", "own_scorers:nothing raised TypeError"),
    ],
)
def test_bad_scores_name_the_function(name, words):
    with pytest.raises(UserError, match=words):
        FunctionReward(f"own_scorers:{name}")(["a", "b"], ["first", "second"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_scorers", "expected module:name"),
        (":lengths", "expected module:name"),
        ("own_scorers:absent", "has no function absent"),
        ("own_scorers:constant", "has no function constant"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ],
)
def test_absent_functions_are_named(name, words):
    with pytest.raises(UserError, match=words):
        FunctionReward(name)


def test_letters_are_counted():
    score = FunctionReward("puzzle.rlhf.rewards:letter_share")
    assert score(["", "", ""], ["ab c", "a1é!", ""]) == [1.0, 0.25, 0.0]


def test_sentiment_reads_the_response_alone():
    pytest.importorskip("vaderSentiment")
    score = FunctionReward("puzzle.rlhf.rewards:vader_sentiment")
    happy, sad, none = score(
        ["awful", "wonderful", "great"], ["I love it, great!", "I hate it.", "It is a table."]
    )
    assert happy > 0.5
    assert sad < -0.3
    assert none == 0
