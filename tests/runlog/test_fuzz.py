"""Logs that anything may have happened to: never a traceback, never a wrong number without a report."""

import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.runlog import Run, RunWriter
from puzzle.runlog.published.read import log_name, read_published
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.records import End, Iteration, Switch
from tests.runlog import texts

FOREIGN = (
    b"(Role pid=24389) > number of parameters on rank (0, 7): 42208256",
    b"\x1b[36m(Role pid=7)\x1b[0m hello",
    b"2024-04-29 20:43:19 INFO Rank 3: Completed barrier with 8 nodes.",
    b"\x00\xff\xfe\x80",
    b"Training time: ",
    b"epoch: 0 | step: ",
    b'{"record":"iteration"',
    b"}",
)


@st.composite
def damage(draw, lines):
    """Lines of a log after several mishaps, joined."""
    lines = list(lines)
    for number in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        # Lines that change places cannot be told in published logs, whose lines have no numbers.
        kinds = ("cut", "insert", "inside", "double", "move", "lose")[: 3 if number else 6]
        match draw(st.sampled_from(kinds)):
            case "cut":
                # A write that broke off: the next line follows without a newline between.
                following = lines.pop(place + 1) if place + 1 < len(lines) else b""
                lines[place] = lines[place][: draw(st.integers(0, len(lines[place])))] + following
            case "insert":
                lines.insert(place, draw(st.one_of(st.sampled_from(FOREIGN), st.binary(max_size=30))))
            case "inside":
                at = draw(st.integers(0, len(lines[place])))
                lines[place] = lines[place][:at] + draw(st.sampled_from(FOREIGN)) + lines[place][at:]
            case "double":
                lines.insert(draw(st.integers(place, len(lines))), lines[place])
            case "move":
                line = lines.pop(place)
                lines.insert(draw(st.integers(0, len(lines))), line)
            case "lose" if len(lines) > 1:
                del lines[place]
    data = b"\n".join(lines) + b"\n"
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return data


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    with RunWriter(folder, texts.header()) as writer:
        for index in range(4):
            parts, e2e = texts.stages(1.0 + index, 0.5, 2.0, switch=0.25)
            writer.write(Switch(index, 0.25, fields={"bytes": 4096}))
            writer.write(Iteration(index, parts, e2e, {"kl": 0.5 + index, "reward": -1.0}))
        writer.write(End("completed"))
    run = read_jsonl(folder / "run.jsonl")
    assert isinstance(run, Run)
    return folder, run, (folder / "run.jsonl").read_bytes().splitlines()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_our_logs(data, ours):
    folder, whole, lines = ours
    path = folder / "fuzzed.jsonl"
    path.write_bytes(data.draw(damage(lines)))
    try:
        run = read_jsonl(path)
    except UserError:
        pytest.fail("one header cannot disagree with itself")
    if not isinstance(run, Run):
        assert run
        return
    known = {one.iteration: one for one in whole.iterations}
    for one in run.iterations:
        # Not even with a report: the checksum tells a damaged number.
        assert one == known[one.iteration]
    # Lines lost at the end are missing silently, as in a run that goes on: it does not say that it ended.
    complete = run.iterations == whole.iterations and run.switches == whole.switches
    assert complete or run.reports or not run.ended


def published(path, lines, data):
    path.write_bytes(data)
    name = log_name(path)
    assert name is not None
    run = read_published(path, name)
    return run


def whole_and_fuzzed(tmp_path_factory, variant, lines, data):
    folder = tmp_path_factory.getbasetemp() / "figure8" / "orion"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"llama_7b_350m_{variant}_2024-04-29T20:35:57+0800.log"
    whole = published(path, lines, texts.as_bytes(lines))
    assert isinstance(whole, Run)
    fuzzed = published(path, lines, data)
    return whole, fuzzed


def alike(one, other):
    return all(math.isclose(one[name], other[name], rel_tol=1e-12) for name in one.keys() & other.keys())


@pytest.mark.parametrize(
    ("variant", "lines"), [("opt", texts.puzzle_lines()), ("dschat", texts.chat_lines())]
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_published_logs(data, variant, lines, tmp_path_factory):
    damaged = data.draw(damage([line.encode() for line in lines]))
    whole, run = whole_and_fuzzed(tmp_path_factory, variant, lines, damaged)
    if not isinstance(run, Run):
        assert run
        return
    if {report.what for report in run.reports} - {report.what for report in whole.reports}:
        return
    # No report beyond those of the whole log: every number is right, and none is missing but at the end.
    for mine, other in zip(run.iterations, whole.iterations, strict=False):
        assert mine.iteration == other.iteration
        assert mine.e2e_seconds == other.e2e_seconds
        assert alike(mine.stage_seconds, other.stage_seconds)
        assert alike(mine.metrics, other.metrics)
    for name, values in run.printed.items():
        if name == "training" and variant == "dschat":
            # Ranks print in any order.
            assert not Counter(values) - Counter(whole.printed[name])
        else:
            assert values == whole.printed[name][: len(values)]


def test_an_engine_line_of_another_iteration_is_no_silent_number(tmp_path_factory):
    """The log's own two end-to-end times of an iteration tell; the last iteration's line is not there."""
    lines = [line.encode() for line in texts.chat_lines()]
    earlier = [line for line in lines if line.startswith(b"|E2E")][-1]
    whole, run = whole_and_fuzzed(
        tmp_path_factory, "dschat", texts.chat_lines(), b"\n".join([*lines, earlier, b""])
    )
    assert isinstance(run, Run)
    new = {report.what for report in run.reports} - {report.what for report in whole.reports}
    assert new == {"iteration 2: two end-to-end times, 24.27 and 25.86 s: a line may be another iteration's"}


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_any_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "figure9" / "orion"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.jsonl", "llama_7b_350m_opt_2024-04-29T20:35:57+0800.log"):
        path = folder / name
        path.write_bytes(data)
        read = read_jsonl(path) if name == "run.jsonl" else published(path, [], data)
        assert isinstance(read, Run) or read


WORDS = st.sampled_from(
    [
        *texts.puzzle_line(1, 7.5, 2.5, 1.25).split(" "),
        *texts.engine_line(27.89, 1.09, 18.46, 7.86).split(" "),
        *texts.step_line(2).split(" "),
        "Training time: 9.5",
        "Generation time: 9.5, exp gen time: 12.5",
        "apply shadow model time: 0.08",
        "\n",
        "\r",
        "9" * 400,
        "-1e999",
    ]
)


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=60))
def test_any_words(tmp_path_factory, words):
    folder = tmp_path_factory.getbasetemp() / "table3" / "orion"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llama_7b_350m_dschat_2024-04-29T20:35:57+0800.log"
    read = published(path, [], " ".join(words).encode())
    assert isinstance(read, Run) or read
