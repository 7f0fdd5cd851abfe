"""The reader of our logs: lines that are torn, doubled, moved, lost or of others are reported."""

import json

import pytest

from puzzle.errors import UserError
from puzzle.runlog import Run, RunWriter
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.record import seal
from puzzle.runlog.records import End, Iteration
from tests.runlog import texts


def checked(record):
    return seal({name: value for name, value in record.items() if name != "crc"}).encode()


@pytest.fixture
def lines(tmp_path):
    with RunWriter(tmp_path / "whole", texts.header()) as writer:
        for index in range(4):
            parts, e2e = texts.stages(1.0 + index, 0.5, 2.0)
            writer.write(Iteration(index, parts, e2e, {"kl": 0.5}))
        writer.write(End("completed"))
    return (tmp_path / "whole" / "run.jsonl").read_bytes().splitlines()


@pytest.fixture
def read(tmp_path):
    def read(lines):
        path = tmp_path / "run.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return read_jsonl(path)

    return read


def whats(run):
    return [(report.line, report.what) for report in (run.reports if isinstance(run, Run) else run)]


def generations(run):
    return [one.stage_seconds["generation"] for one in run.iterations]


def test_a_clean_log(lines, read):
    run = read(lines)
    assert whats(run) == []
    assert generations(run) == [1.0, 2.0, 3.0, 4.0]


def test_doubled_lines(lines, read):
    run = read([*lines[:3], lines[2], *lines[3:]])
    assert whats(run) == [(4, "the same line again, seq 2, also line 3")]
    assert generations(run) == [1.0, 2.0, 3.0, 4.0]


def test_moved_lines(lines, read):
    run = read([lines[0], lines[2], lines[1], *lines[3:]])
    assert whats(run) == [(3, "out of order: seq 1 after 2")]
    assert generations(run) == [1.0, 2.0, 3.0, 4.0]


def test_lost_lines(lines, read):
    run = read(lines[:2] + lines[4:])
    assert whats(run) == [
        (3, "records are missing before this line: seq 2 to 3"),
        (None, "2 iterations are missing, the first is 1"),
    ]
    assert generations(run) == [1.0, 4.0]


def test_torn_binary_and_foreign_lines(lines, read):
    run = read([*lines[:2], lines[2][:50], lines[2], b"\x00\xff", b"hello", b"", *lines[3:]])
    assert [line for line, _ in whats(run)] == [3, 5, 6]
    assert generations(run) == [1.0, 2.0, 3.0, 4.0]


def test_two_writers_with_the_same_numbers(lines, read):
    other = {
        **json.loads(lines[2]),
        **dict(zip(("stage_seconds", "e2e_seconds"), texts.stages(9.0, 1.0, 1.0), strict=True)),
    }
    run = read([*lines, checked(other)])
    assert whats(run) == [(7, "another line with the same seq; this one counts, seq 2, also line 3")]
    assert generations(run) == [1.0, 9.0, 3.0, 4.0]


def test_an_iteration_again_without_a_resume(lines, read):
    again = {**json.loads(lines[2]), "seq": 6}
    run = read([*lines, checked(again)])
    assert whats(run) == [(7, "iteration 1 again without a resume; this one counts")]


def test_a_second_header(lines, read):
    same = {**json.loads(lines[0]), "seq": 6}
    assert whats(read([*lines, checked(same)])) == [(7, "the same run record again")]
    with pytest.raises(UserError, match="two runs that disagree: line 7"):
        read([*lines, checked({**same, "variant": "base"})])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([b""], "empty log"),
        ([b"hello"], "not JSON"),
        ([b'{"prompt": "Why?"}'], "is not one of"),
    ],
)
def test_what_is_no_run_is_one_report(read, content, what):
    ((_, text),) = whats(read(content))
    assert "no readable run record" in text
    assert what in text


def test_an_unknown_schema_is_said(lines, read):
    newer = {**json.loads(lines[0]), "schema": 2}
    del newer["crc"]
    ((_, text),) = whats(read([json.dumps(newer).encode(), *lines[1:]]))
    assert "schema of run must be 1" in text


def test_a_huge_iteration_number_does_no_harm(lines, read):
    far = {**json.loads(lines[2]), "seq": 6, "iteration": 2**62}
    assert whats(read([*lines, checked(far)])) == [
        (None, f"{2**62 - 4} iterations are missing, the first is 4")
    ]


def test_printed_series_in_the_log_count(lines, read):
    record = {"record": "printed", "seq": 6, "name": "e2e", "unit": "s", "values": [3, 2.5]}
    assert dict(read([*lines, checked(record)]).printed) == {"e2e": (3.0, 2.5)}


def test_a_line_without_checksum_among_others_is_doubted(lines, read):
    record = json.loads(lines[2])
    del record["crc"]
    run = read([*lines[:2], json.dumps(record).encode(), *lines[3:]])
    assert whats(run) == [(3, "no checksum, unlike other lines: it may be damaged")]
