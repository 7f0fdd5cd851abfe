"""Options to nested values, and who is named where one of them is refused."""

import json
from pathlib import Path

import pytest

from puzzle.config.load import load_config, parse_overrides
from puzzle.errors import UserError

FILE = """\
layout: {dp: 2}
actor: {model: some/actor}
reward: {function: "scorers:length"}
data: {prompts: prompts.jsonl}
algorithm:
generation: {max_new_tokens: 20}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "1", "--layout", '{"tp": 1, "tp": 2}'], "--layout: 'tp' is given twice, 1 and 2; leave"),
        (["--actor", '{"layout": {"tp": 1, "tp": true}}'], "--actor: 'tp' is given twice, 1 and true"),
        (
            ["--reward.functions", '[{"function": "m:f", "function": "m:g"}]'],
            "--reward.functions: 'function' is given twice, 'm:f' and 'm:g'",
        ),
        (['--reward.functions={"weight": 1, "weight": 2}'], "--reward.functions: 'weight' is given twice"),
        (["--generation.stop"], "argument --generation.stop: expected one argument"),
        (["--log.trace", "[1", "2]"], "--log.trace '[1': neither JSON nor names between commas"),
        (["--seed=1", "2"], "unrecognized arguments: 2"),
    ],
)
def test_refused_in_a_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_overrides(words)
    assert str(raised.value).startswith(said)


def test_a_key_may_be_said_twice_alike_and_texts_are_no_json() -> None:
    assert parse_overrides(["--layout", '{"tp": 2, "tp": 2}']) == {"layout": {"tp": 2}}
    assert parse_overrides(["--data.system", '{"a": 1, "a": 2}']) == {"data": {"system": '{"a": 1, "a": 2}'}}


@pytest.mark.parametrize(
    "stops",
    [["\n\n", "\t"], ['say "hi"'], ["\\", "a\\n"], ["a,b", "[c]"], ["\u00e9\U0001f600"], ["null", "5", ""]],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_texts_in_lists_are_those_of_json(stops: list[str], ascii_only: bool) -> None:
    text = json.dumps(stops, ensure_ascii=ascii_only)
    for word in (text, f" {text} ", text[1:-1]):
        assert parse_overrides(["--generation.stop", word]) == {"generation": {"stop": stops}}


def test_lists_go_on_and_words_are_taken_as_they_are() -> None:
    words = ["--generation.stop", r"\n,5", "--log.trace", "1", "--generation.stop=[x]", "--log.trace=[2,3]"]
    assert parse_overrides(words) == {"generation": {"stop": [r"\n", "5", "x"]}, "log": {"trace": [1, 2, 3]}}


@pytest.mark.parametrize(
    ("words", "stop"),
    [
        (["--generation.stop", "a", "--generation", '{"stop": ["b"]}', "--generation.stop", "c"], ["b", "c"]),
        (["--generation.stop", "a", "--generation.stop", "null", "--generation.stop", "b"], ["b"]),
        (["--generation", '{"stop": ["b"]}', "--generation.stop", "c"], ["b", "c"]),
        (["--generation", '{"stop": null}', "--generation.stop", "c"], ["c"]),
    ],
)
def test_lists_go_on_with_what_stands_there(words: list[str], stop: list[str]) -> None:
    assert parse_overrides(words) == {"generation": {"stop": stop}}


def test_sections_lie_over_one_another_in_order() -> None:
    one, other = ["--actor.layout", '{"tp": 2, "dp": 3}'], ["--actor.layout.tp", "4"]
    assert parse_overrides([*one, *other]) == {"actor": {"layout": {"tp": "4", "dp": 3}}}
    assert parse_overrides([*other, *one]) == {"actor": {"layout": {"tp": 2, "dp": 3}}}
    assert parse_overrides([*one, "--actor", '{"layers": 1}', "--actor.layout", "null"]) == {
        "actor": {"layout": None, "layers": 1}
    }


PLACES = [
    (["--generation.stop", '["a", "\\ud83d"]'], "command line: generation.stop: expected text without half"),
    (["--data.system", "a\udcff"], "command line: data.system: expected text without half characters"),
    (["--reward.functions", '[{"function": "m:\\udc00"}]'], "command line: reward.functions: expected text"),
    (["--numerics_parts", "2"], "command line: numerics_parts: only"),
    (["--batch", "7", "--algorithm.minibatch", "5"], "command line: algorithm.minibatch 5 does not divide"),
    (["--algorithm.minibatch", "7"], "command line: algorithm.minibatch 7 does not divide"),
    (["--data.random_tokens", "3"], "FILE:4 and command line: data: give prompts"),
    (["--layout.stages", "1,1"], "command line: layout: stages lists 2 stages but pp is 1"),
    (["--layout.pp=2", "--critic.layout.tp=3"], "command line: critic.layout: tp x pp x dp = 3 x 2 x 2"),
    (["--actor.init.preset=7b", "--actor.model=a"], "command line: actor: give model or init"),
    (["--generation.min_new_tokens=30"], "command line and FILE:6: generation: min_new_tokens 30 exceeds"),
    (["--algorithm.overlong.penalty=1"], "command line: algorithm.overlong.buffer: a value is missing"),
    (["--algorithm.name", "grpo"], "FILE and command line: generation.samples: grpo compares"),
]


@pytest.mark.parametrize(("words", "said"), PLACES)
def test_a_refusal_names_the_places_of_the_keys_in_it(file: Path, words: list[str], said: str) -> None:
    """Not the file alone, where the command line gave them."""
    with pytest.raises(UserError) as raised:
        load_config(file, words)
    assert str(raised.value).replace(str(file), "FILE").startswith(said)
