"""What a reward function is given: by the names of its parameters, of every response."""

import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.data.endings import Endings, endings
from puzzle.data.prompts import Prompt
from puzzle.data.tokenizers import byte_tokenizer, encode
from puzzle.errors import UserError
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.functions import FunctionReward
from puzzle.rlhf.rewards.signature import parameters
from puzzle.rlhf.rollout import compute_scores, is_finished, reward_batch, reward_sequences

BATCH = RewardBatch(
    ["2+2", "2+2", "x"],
    ["4", "5", "no"],
    [[52], [53], [110, 111]],
    [None, None, [{"role": "user", "content": "x"}]],
    ["k0", "k0", "k1"],
    [True, False, True],
    {"answer": ["4", "4", "y"], "level": [1, 1, 2], "ids": ["hidden"] * 3},
)
COLUMNS = ("answer", "level", "ids")


def both(function):
    """(columns, result) of a call as runs make it."""
    found = parameters("f", function)
    values, named = found.arguments(BATCH)
    return found.columns(COLUMNS, "data.jsonl"), function(*values, **named)


def test_parameters_are_given_by_name() -> None:
    def graded(answer, responses):
        return [float(a == r) for a, r in zip(answer, responses, strict=True)]

    def of_all(finished, ids, messages, response_ids, responses, prompts):
        return [finished, ids, messages, response_ids, responses, prompts]

    assert both(graded) == (["answer"], [1.0, 0.0, 0.0])
    columns, got = both(of_all)
    assert columns == []
    assert got == [
        [True, False, True],
        ["k0", "k0", "k1"],
        [None, None, [{"role": "user", "content": "x"}]],
        [[52], [53], [110, 111]],
        ["4", "5", "no"],
        ["2+2", "2+2", "x"],
    ]
    assert got[4] is not BATCH.responses  # what a function does to its lists stays there


def test_keywords_defaults_and_the_rest() -> None:
    def some(responses, *, level, answer=None, absent=7):
        return [level, answer, absent]

    def rest(responses, **columns):
        return columns

    assert both(some) == (["level", "answer"], [[1, 1, 2], ["4", "4", "y"], 7])
    columns, got = both(rest)
    assert columns == ["answer", "level"]  # `ids` is the prompts' ids, whatever the file says
    assert sorted(got) == ["answer", "finished", "ids", "level", "messages", "prompts", "response_ids"]
    assert got["ids"] == ["k0", "k0", "k1"]
    by_partial = functools.partial(some, level="mine")
    assert both(by_partial)[1] == ["mine", ["4", "4", "y"], 7]


@pytest.mark.parametrize(
    "function",
    [
        lambda p, r: (p, r),
        lambda _prompts, responses: (_prompts, responses),
        lambda p, r, /: (p, r),
        lambda *both: both,
        lambda p, r, level=None: (p, r) if level == [1, 1, 2] else None,
    ],
)
def test_the_first_two_by_position(function) -> None:
    assert both(function)[1] == (BATCH.prompts, BATCH.responses)


@pytest.mark.parametrize(
    ("function", "odd"),
    [
        (lambda responses, anwser: 0, "anwser"),
        (lambda prompts, anwser: 0, "anwser"),
        (lambda p, r, anwser: 0, "anwser"),
        (lambda anwser: 0, "anwser"),
        (lambda responses, *, anwser, **rest: 0, "anwser"),
    ],
)
def test_other_names_are_refused_with_those_that_exist(function, odd) -> None:
    with pytest.raises(UserError) as raised:
        parameters("reward.function m:f", function).columns(COLUMNS, "data.jsonl")
    said = str(raised.value)
    assert "reward.function m:f takes (" in said
    assert f"'{odd}' is neither one of prompts, responses, response_ids, messages, ids, finished" in said
    assert said.endswith("nor a column of data.jsonl, which has answer, level")


def test_a_function_in_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/its_neighbour.py").write_text("VALUE = 3.0\n")
    (tmp_path / "sub/json.py").write_text(  # whose name another module has
        "from __future__ import annotations\n"
        "import dataclasses, its_neighbour\n@dataclasses.dataclass\nclass Of: value: float\n"
        "def score(responses): return [Of(its_neighbour.VALUE).value] * len(responses)\n"
    )
    reward = FunctionReward(f"{tmp_path}/sub/json.py:score")
    assert reward.score(BATCH) == [3.0, 3.0, 3.0]
    assert sys.modules["json"] is json
    monkeypatch.chdir(tmp_path)
    assert FunctionReward("sub/json.py:score").score(BATCH) == [3.0, 3.0, 3.0]
    with pytest.raises(UserError, match=r"absent\.py:f: /.*absent\.py: no such file"):
        FunctionReward("absent.py:f")


def test_a_function_without_a_signature_has_prompts_and_responses_alone(monkeypatch) -> None:
    """As some written in C."""

    def hidden(*given):
        return given

    def refuse(_function):
        raise ValueError("no signature")

    monkeypatch.setattr("puzzle.rlhf.rewards.signature.inspect.signature", refuse)
    found = parameters("f", hidden)
    assert found.columns(COLUMNS, "data.jsonl") == []
    values, named = found.arguments(BATCH)
    assert (values, named) == ([BATCH.prompts, BATCH.responses], {})


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([(1, 2), (3,)], None),
        ([(1, 9), (3,)], None),
        ([(1, 2), (10,)], "judge: token 10 is outside its vocabulary of 10"),
        ([(1,) * 4, (1,)], None),
        ([(1,) * 5, (1,)], "judge: a dialogue of 5 tokens exceeds its 4 positions"),
        ([(1,), (1,) * 5], "judge: a dialogue of 5 tokens exceeds its 4 positions"),
    ],
)
def test_a_reward_model_refuses_what_it_does_not_know(monkeypatch, sequences, said) -> None:
    monkeypatch.setattr(
        "puzzle.rlhf.rollout.MicroBatches", lambda *_: SimpleNamespace(batches=[], passes=[0])
    )
    model: Any = SimpleNamespace(name="judge", spec=SimpleNamespace(vocab_size=10, max_positions=4))
    config: Any = None
    if said is None:
        compute_scores(model, sequences, config)
        return
    with pytest.raises(UserError, match=f"^{said}"):
        compute_scores(model, sequences, config)


@pytest.mark.parametrize("knows_text", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_reward_model_reads_the_same_ids_or_the_same_text(knows_text, reads) -> None:
    """What its reader makes of each row, where it has one and there are texts; stop texts are no part."""
    tokenizer = byte_tokenizer()
    prompts = [Prompt(n, str(n), f"ask {n}", None, tuple(encode(tokenizer, f"ask {n}"))) for n in range(2)]
    said = ["one##", "two", "three##", "##"]
    responses = tuple(tuple(encode(tokenizer, text)) for text in said)
    experience = Experience(tuple(p.tokens for p in prompts), (0, 1), responses, 2)

    def reader(prompt, response, text):
        return [prompt.index, len(response), *map(ord, text)]

    read: Any = reader if reads else None
    found = reward_sequences(experience, prompts, tokenizer if knows_text else None, read, ("##",))
    if knows_text and reads:
        texts = ["one", "two", "three", ""]
        assert found == [[n // 2, len(responses[n]), *map(ord, text)] for n, text in enumerate(texts)]
    else:
        assert found == [prompts[n // 2].tokens + responses[n] for n in range(4)]
        shorter = reward_sequences(experience, prompts, None, None, ("##",), pad=responses[0][-1])
        ends = [2, 0, 2, 2]  # of "#", which "two" has not
        assert shorter == [ids[: len(ids) - end] for ids, end in zip(found, ends, strict=True)]


def test_the_batch_of_an_experience() -> None:
    """Rows of the samples repeat their prompt's columns; `finished` says what ended a response."""
    tokenizer = byte_tokenizer()
    ends = endings(tokenizer, None, ("ab",))
    prompts = [
        Prompt(4, "four", "P", None, (80,), columns={"answer": 1, "tags": ["x"]}),
        Prompt(9, "nine", "Q", ({"role": "user", "content": "Q"},), (81,), columns={"answer": 2, "tags": []}),
    ]
    eos = ends.stop_ids[0]
    a, b = encode(tokenizer, "ab")
    responses = ((a, a, eos), (a, a, a), (a, b), (a, a, b))
    experience = Experience(((80,), (81,)), (4, 9), responses, samples=2)
    said = (["P", "P", "Q", "Q"], ["aa", "aaa", "", "a"])
    batch = reward_batch(experience, prompts, said, ends, 3)
    assert batch.columns == {"answer": [1, 1, 2, 2], "tags": [["x"], ["x"], [], []]}
    assert batch.finished == [True, False, True, True]
    assert batch.ids == ["four", "four", "nine", "nine"]
    assert batch.messages == [
        None,
        None,
        [{"role": "user", "content": "Q"}],
        [{"role": "user", "content": "Q"}],
    ]
    assert batch.response_ids == [list(response) for response in responses]


@pytest.mark.parametrize(
    ("response", "finished"), [((1, 2), True), ((1, 2, 3), False), ((1, 2, 9), True), ((9, 2, 3), False)]
)
def test_without_stop_texts_the_last_token_or_the_length_says_whether_it_ended(response, finished) -> None:
    prompt = Prompt(0, "0", "", None, (1,))
    assert is_finished(prompt, response, Endings((9,), (9,)), 3) is finished


CONFIG = """\
iterations: 1
batch: 2
actor:
  init: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
         num_attention_heads: 2, max_position_embeddings: 64}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 24, shuffle: false}
generation: {max_new_tokens: 3, samples: 2}
checkpoint: {save: false}
log: {plots: false}
"""
SCORERS = """
def graded(ids, answer, prompts, finished, response_ids):
    assert all(len(r) == 3 or f for r, f in zip(response_ids, finished))
    return [100 * a + int(p[-1]) for a, p in zip(answer, prompts)]
def wrong(responses, anwser): return [0.0] * len(responses)
"""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own; gives exit code, stderr."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "scorers.py").write_text(SCORERS)
    rows = [{"prompt": f"number {i}", "answer": 10 + i, "unread": "x" * 9} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "scorers", raising=False)

    def run(*options):
        code = main(["train", "--config", "run.yaml", "--out", "out", *options])
        return code, capsys.readouterr().err

    return run


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_columns_reach_the_function_of_a_run(tmp_path, train, ranks) -> None:
    code, err = train("--reward.function", "scorers.py:graded", "--layout.dp", ranks)
    assert (code, err) == (0, "")
    assert [row["reward"] for row in samples(tmp_path / "out")] == [1000.0, 1000.0, 1101.0, 1101.0]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_parameter_without_a_column_is_refused_before_anything_is_loaded(tmp_path, train, options) -> None:
    code, err = train("--reward.function", "scorers:wrong", *options)
    assert code == 2
    assert err.startswith("error: reward.function scorers:wrong (")
    assert err.endswith("nor a column of prompts.jsonl, which has prompt, answer, unread\n")
    assert not (tmp_path / "out").exists()


def test_a_row_that_lacks_a_column_is_named(tmp_path, train) -> None:
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "number 5"}\n')
    code, err = train("--reward.function", "scorers:graded")
    assert (code, err) == (2, "error: prompts.jsonl:5: no field 'answer'; it has prompt\n")
