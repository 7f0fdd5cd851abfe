"""JSON of files, servers and command lines: one reading, which takes no key for two values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.files.jsonio import RepeatedKey, parse, read_object
from puzzle.rlhf.rewards.server import _scores

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


@given(VALUES)
def test_what_has_no_repeated_key_is_read_as_python_reads_it(value: object) -> None:
    assert parse(json.dumps(value), "here") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 0, "a": 2}', "'a' is given twice, 1 and 2; leave one out"),
        ('[{"x": {"a": 1, "a": 1.0}}]', "'a' is given twice, 1 and 1.0"),
        ('{"a": 1, "\\u0061": true}', "'a' is given twice, 1 and true"),
        ('{"a": [1], "a": [1, 2]}', "'a' is given twice, [1] and [1, 2]"),
    ],
)
def test_a_key_of_two_values_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RepeatedKey) as raised:
        parse(text, "here")
    assert str(raised.value).startswith(f"here: {said}")
    if text.startswith("{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: 'a' is given twice"):
            read_object(tmp_path / "config.json")


def test_a_key_said_twice_alike_is_said_once() -> None:
    """As Python writes {1: "x", "1": "x"}, the labels of some models."""
    assert parse(json.dumps({1: ["x"], "1": ["x"]}), "here") == {"1": ["x"]}


def test_servers_are_read_so() -> None:
    assert _scores("http://one", b'{"scores": [1.5]}') == [1.5]
    with pytest.raises(UserError, match="http://one: 'scores' is given twice"):
        _scores("http://one", b'{"scores": [1], "scores": [2]}')
    with pytest.raises(UserError, match="no JSON"):
        _scores("http://one", b"\xff")
