"""The schema: what is refused, on writing and on reading, and that the page about it knows every field."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.files.limits import MOST_NAME
from puzzle.runlog import Run, RunWriter
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.record import BadLine, Line, Record, decode, encode, seal, shape
from puzzle.runlog.records import Counts, Iteration, RunHeader, Text
from tests.runlog import texts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "log-schema.md"
STAGES, E2E = texts.stages(1.0, 0.5, 2.0)


def iteration(**changes):
    record = {"record": "iteration", "seq": 1, "iteration": 0, "stage_seconds": STAGES, "e2e_seconds": E2E}
    return {**record, "metrics": {"reward": 0.5, "kl": None}, **changes}


def as_dict(line):
    """What a line says, by the library's reader, without its checksum."""
    return {name: value for name, value in json.loads(line).items() if name != "crc"}


def test_round_trip():
    stages, e2e = texts.stages(1.0, 0.5, 2.0)
    for record in (texts.header(), Iteration(0, stages, e2e, {"reward": 0.5}, fields={"more": [1, None]})):
        text = encode(Line(1, record, 2.5))
        assert "\n" not in text
        assert decode(text.encode()) == Line(1, record, 2.5)
    assert as_dict(text) == {**iteration(metrics={"reward": 0.5}), "time": 2.5, "more": [1, None]}


def test_the_shipped_logs_would_be_written_as_they_are():
    """Every line of every log in the repository, byte by byte."""
    moved = []
    logs = [path for path in (ROOT / "logs").rglob("*.jsonl") if b'{"record":"run"' in path.read_bytes()[:99]]
    assert len(logs) > 100
    for path in logs:
        for line in path.read_bytes().splitlines():
            again = encode(decode(line))
            if again.encode() != line:
                assert as_dict(again) == as_dict(line), path
                moved.append(json.loads(line)["record"])
    assert moved == ["run"] * 3  # headers of the first runs, whose `repeat` stood last


def test_a_new_kind_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(Record, "kinds", dict(Record.kinds))

    @dataclass(frozen=True)
    class Probe(Record, kind="probe"):
        name: Text
        ranks: Counts | None = None

        def for_people(self) -> str:
            return f"probed {self.name}"

    probes = (Probe("a"), Probe("b", {"free": 3}, fields={"why": None}))
    with RunWriter(tmp_path, texts.header()) as writer:
        for probe in probes:
            writer.write(probe)
        with pytest.raises(ValueError, match="ranks of probe must map names to whole numbers >= 0"):
            writer.write(Probe("c", {"free": -1}))
    run = read_jsonl(tmp_path / "run.jsonl")
    assert isinstance(run, Run)
    assert (run.of(Probe), run.reports) == (probes, ())
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert '"name":"b","ranks":{"free":3},"why":null,"crc":' in lines[2]
    assert '"name":"a","crc":' in lines[1]
    said = (tmp_path / "run.log").read_text().splitlines()[-2:]
    assert [line[20:] for line in said] == ["probed a", "probed b"]


def test_a_field_without_a_form_is_a_mistake():
    @dataclass(frozen=True)
    class Loose(Record):
        name: str

    with pytest.raises(TypeError, match=r"Loose\.name: annotate it with a Form"):
        Loose("a").to_json()


def test_a_line_without_checksum_is_accepted_one_with_a_wrong_one_is_not():
    line = seal(iteration())
    assert decode(json.dumps(iteration()).encode()) == decode(line.encode())
    with pytest.raises(BadLine, match="checksum"):
        decode(line.replace('"reward":0.5', '"reward":0.6').encode())
    with pytest.raises(BadLine, match="checksum"):
        decode(line.replace('"seq":1', '"seq": 1').encode())


@given(st.data())
def test_one_flipped_byte_never_gives_another_record(data):
    line = bytearray(seal(iteration()).encode())
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode(bytes(line))
    except BadLine:
        return
    # A flip in the checksum's own name turns it into a field of another name.
    known = as_dict(encode(read))
    assert {name: known.get(name) for name in iteration()} == iteration()


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
        ({"e2e_seconds": 1.1e9}, "must be seconds >= 0"),
        ({"stage_seconds": {**STAGES, "training": 1.1e9}}, "to seconds >= 0"),
        ({"seq": None}, "seq of iteration must be a whole number"),
        ({"e2e_seconds": 3.6}, "add up to 3.500000 s, e2e_seconds is 3.600000 s"),
        ({"stage_seconds": {"generation": 3.5}}, "exactly the keys generation, inference"),
        ({"stage_seconds": [3.5]}, "exactly the keys"),
        ({"stage_seconds": texts.stages(-1.0, 2.5, 2.0)[0]}, "exactly the keys generation, inference"),
        ({"stage_seconds": {**STAGES, "other": "none"}}, "to seconds >= 0"),
        ({"metrics": {"kl": "high"}}, "must map names to finite numbers or null"),
    ],
)
def test_what_breaks_the_schema_is_refused_on_both_sides(changes, what):
    record = iteration(**changes)
    with pytest.raises(BadLine, match=re.escape(what)):
        decode(json.dumps(record).encode())
    own = {name: value for name, value in record.items() if name not in ("record", "seq")}
    if isinstance(own["stage_seconds"], dict) and not {"record", "seq"} & changes.keys():
        with pytest.raises(ValueError, match=re.escape(what)):
            encode(Line(1, Iteration(**own)))


@pytest.mark.parametrize("whole", [1e-3, 3.5, 0.999e9])
@pytest.mark.parametrize(("share", "fits"), [(0.0, True), (0.9e-6, True), (1.1e-6, False), (1e-3, False)])
def test_stages_add_up_within_a_millionth(whole, share, fits):
    """Of the whole, whichever is larger: what three decimals of a millisecond can lose."""
    for sign in (1, -1):
        stages = {**texts.stages(whole / 2, whole / 4, whole / 4)[0]}
        record = iteration(stage_seconds=stages, e2e_seconds=whole * (1 + sign * share))
        if fits:
            assert isinstance(decode(json.dumps(record).encode()).record, Iteration)
        else:
            with pytest.raises(BadLine, match="add up to"):
                decode(json.dumps(record).encode())


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_lines_are_ascii_whatever_they_say(said):
    """Half-written characters of other encodings cannot occur."""
    line = encode(Line(1, texts.header(cluster=f"x{said}", config={said: said})))
    assert line.isascii()
    read = decode(line.encode()).record
    assert isinstance(read, RunHeader)
    assert (read.cluster, read.config) == (f"x{said}", {said: said})


VALUES = (
    None, True, False, 0, 3, -1, 2**63 - 1, 2**63, 10**400, 1.5, -0.5, 2e9, "", "a", "x" * MOST_NAME,
    "x" * (MOST_NAME + 1), "measured", [], ["a"], ["a", 1], [1], [1.5, -2], [None], [True], {}, {"a": 1},
    {"a": 1, "b": -1}, {"a": 1.5}, {"a": None}, {"a": True}, {"a": "b"}, STAGES, {**STAGES, "other": -1.0},
)  # fmt: skip


def number(value):
    return type(value) in (int, float) and abs(value) < 1e308


def count(value):
    return type(value) is int and 0 <= value < 2**63


def each(value, kind, fits):
    return type(value) is kind and all(fits(one) for one in (value.values() if kind is dict else value))


RIGHT = {
    "be an object": lambda v: type(v) is dict,
    "be a non-empty text": lambda v: type(v) is str and v != "",
    "be a text or null": lambda v: type(v) is str,
    f"be a text of 1 to {MOST_NAME} characters": lambda v: type(v) is str and 1 <= len(v) <= MOST_NAME,
    "be a list of texts": lambda v: each(v, list, lambda one: type(one) is str),
    "be a whole number >= 0": count,
    "map names to whole numbers >= 0": lambda v: each(v, dict, count),
    "be a finite number": number,
    "be a list of finite numbers": lambda v: each(v, list, number),
    "be seconds >= 0": lambda v: number(v) and 0 <= v <= 1e9,
    "map names to seconds >= 0": lambda v: each(v, dict, lambda one: number(one) and 0 <= one <= 1e9),
    "map names to finite numbers or null": lambda v: each(v, dict, lambda one: one is None or number(one)),
    "map exactly the keys generation, inference, training, switch, other to seconds >= 0": (
        lambda v: type(v) is dict and v.keys() == STAGES.keys()
    ),
    "be 1, the version known here": lambda v: v == 1,
    "be one of measured, published, simulated, rehearsal": lambda v: v == "measured",
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, record in Record.kinds.items() for name in shape(record)]
)
def test_every_field_takes_what_it_must_be_and_nothing_else(kind, name):
    """Whatever JSON holds there; what is taken is written again as it was."""
    record = Record.kinds[kind]
    must = shape(record)[name].form.must
    null = type(None) in get_args(get_type_hints(record)[name])
    whole = {"generation": 0, "inference": 0, "training": 0, "switch": 0, "other": 0}
    base = as_dict(encode(Line(1, texts.header()))) if kind == "run" else {"record": kind, "seq": 1}
    filler = {"be a whole": 1, "be seconds": 0, "map exactly": whole, "map ": {}, "be a list": []}
    for other, field in shape(record).items():
        if not field.optional and other not in base:
            base[other] = next((v for words, v in filler.items() if field.form.must.startswith(words)), "x")
    for value in VALUES:
        line = {**base, name: value}
        if kind == "iteration" and name in ("stage_seconds", "e2e_seconds"):  # they must add up
            whole_of: Any = value
            line["e2e_seconds"] = sum(whole_of.values()) if value in VALUES[-2:] else value
            line["stage_seconds"] = {**whole, "training": value} if name == "e2e_seconds" else value
        if (value is None and null) or (value is not None and RIGHT[must](value)):
            again = as_dict(encode(decode(json.dumps(line).encode())))
            assert again.get(name, {} if value == {} else None) == value
        else:
            with pytest.raises(BadLine, match="|".join(map(re.escape, (f"must {must}", "must map exactly")))):
                decode(json.dumps(line).encode())


def test_what_is_left_over_may_be_negative():
    stages, e2e = texts.stages(1.0, 0.5, 2.0, other=-0.2)
    read = decode(encode(Line(1, Iteration(0, stages, e2e, {}))).encode()).record
    assert isinstance(read, Iteration)
    assert (read.e2e_seconds, read.stage_seconds["other"]) == (e2e, -0.2)


@pytest.mark.parametrize(
    "missing", [name for name in shape(RunHeader) if name not in ("schema", "plan", "given", "log")]
)
def test_a_header_must_be_complete(missing):
    record = as_dict(encode(Line(0, texts.header())))
    del record[missing]
    with pytest.raises(BadLine, match=f"run lacks {missing}"):
        decode(json.dumps(record).encode())


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
            encode(Line(1, Iteration(0, texts.stages(1.0, 0.5, 2.0)[0], value, {})))
        with pytest.raises(ValueError):
            encode(Line(1, texts.header(config={"rate": [value]})))  # where the schema asks for no number
        with pytest.raises(BadLine):
            decode(json.dumps(iteration(metrics={"kl": value})).encode())


@pytest.mark.parametrize(("critic", "pair"), [("350M", "7B/350M"), (None, "7B")])
def test_a_pair_is_the_actor_alone_without_a_critic(critic, pair):
    assert texts.header(critic=critic).pair == pair


def test_another_schema_version_is_said():
    record = {**as_dict(encode(Line(0, texts.header()))), "schema": 7}
    with pytest.raises(BadLine, match="schema of run must be 1"):
        decode(json.dumps(record).encode())


def test_the_page_names_every_record_and_field():
    page = PAGE.read_text()
    for kind, record in Record.kinds.items():
        section = re.search(rf"^### `{kind}`\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"{PAGE.name} has no section `{kind}`"
        for name in shape(record):
            assert f"`{name}`" in section[1], f"{PAGE.name} does not tell `{name}` of `{kind}`"
