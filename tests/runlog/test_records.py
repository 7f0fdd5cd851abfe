"""The schema: what is refused, on writing and on reading, and that the page about it knows every field."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.runlog import records
from puzzle.runlog.records import BadLine, decode, encode
from tests.runlog import texts

PAGE = Path(__file__).parents[2] / "docs" / "log-schema.md"


def iteration(**changes):
    stages, e2e = texts.stages(1.0, 0.5, 2.0)
    record = {"record": "iteration", "seq": 1, "iteration": 0, "stage_seconds": stages, "e2e_seconds": e2e}
    return {**record, "metrics": {"reward": 0.5, "kl": None}, **changes}


def test_round_trip():
    for record in ({**records.of_header(texts.header()), "seq": 0}, iteration()):
        line = encode(record)
        assert "\n" not in line
        assert decode(line.encode()) == json.loads(json.dumps(record))


def test_a_line_without_checksum_is_accepted_one_with_a_wrong_one_is_not():
    line = encode(iteration())
    assert decode(json.dumps(iteration()).encode()) == iteration()
    with pytest.raises(BadLine, match="checksum"):
        decode(line.replace('"reward":0.5', '"reward":0.6').encode())
    with pytest.raises(BadLine, match="checksum"):
        decode(line.replace('"seq":1', '"seq": 1').encode())


@given(st.data())
def test_one_flipped_byte_never_gives_another_record(data):
    line = bytearray(encode(iteration()).encode())
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode(bytes(line))
    except BadLine:
        return
    # A flip in the checksum's own name turns it into a field of another name.
    assert {name: read.get(name) for name in iteration()} == iteration()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"record": "iterations"}, "is not one of"),
        ({"record": None}, "is not one of"),
        ({"seq": -1}, "seq of iteration must be a whole number"),
        ({"seq": True}, "seq of iteration must be a whole number"),
        ({"iteration": 1.5}, "iteration of iteration must be a whole number"),
        ({"e2e_seconds": -1.0}, "must be seconds >= 0"),
        ({"e2e_seconds": "3.5"}, "must be seconds >= 0"),
        ({"e2e_seconds": 10**400}, "must be seconds >= 0"),
        ({"e2e_seconds": 3.6}, "add up to 3.500000 s, e2e_seconds is 3.600000 s"),
        ({"stage_seconds": {"generation": 3.5}}, "exactly the keys generation, inference"),
        ({"stage_seconds": [3.5]}, "exactly the keys"),
        ({"stage_seconds": texts.stages(-1.0, 2.5, 2.0)[0]}, "generation must be seconds >= 0"),
        ({"metrics": {"kl": "high"}}, "must map names to finite numbers or null"),
    ],
)
def test_what_breaks_the_schema_is_refused_on_both_sides(changes, what):
    record = iteration(**changes)
    with pytest.raises(ValueError, match=re.escape(what)):
        encode(record)
    with pytest.raises(BadLine, match=re.escape(what)):
        decode(json.dumps(record).encode())


def test_what_is_left_over_may_be_negative():
    stages, e2e = texts.stages(1.0, 0.5, 2.0, other=-0.2)
    assert decode(encode(iteration(stage_seconds=stages, e2e_seconds=e2e)).encode())["e2e_seconds"] == e2e


@pytest.mark.parametrize("missing", [name for name in records.FIELDS["run"][0] if name != "schema"])
def test_a_header_must_be_complete(missing):
    record = {**records.of_header(texts.header()), "seq": 0}
    del record[missing]
    with pytest.raises(ValueError, match=f"run lacks {missing}"):
        encode(record)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"NaN", b'{"record":"run"', b"[" * 100000, b"9" * 5000],
)
def test_lines_that_hold_no_record(line):
    with pytest.raises(BadLine):
        decode(line)


def test_nan_and_infinity_are_no_json():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            encode(iteration(e2e_seconds=value))
        with pytest.raises(BadLine):
            decode(json.dumps(iteration(metrics={"kl": value})).encode())


def test_another_schema_version_is_said():
    record = {**records.of_header(texts.header()), "seq": 0, "schema": 7}
    with pytest.raises(BadLine, match="schema of run must be 1"):
        decode(json.dumps(record).encode())


def test_the_page_names_every_record_and_field():
    page = PAGE.read_text()
    for kind, (needed, allowed) in records.FIELDS.items():
        section = re.search(rf"^### `{kind}`\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"{PAGE.name} has no section `{kind}`"
        for name in (*needed, *allowed):
            assert f"`{name}`" in section[1], f"{PAGE.name} does not tell `{name}` of `{kind}`"
