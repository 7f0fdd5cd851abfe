"""Reward functions in processes of their own, alone and beside one another, and runs that have several."""

import os
import threading
import time

import pytest

from puzzle.errors import UserError
from puzzle.rlhf.rewards.batch import RewardBatch
from tests.rlhf.pooled import laid_out, pooled

folder = pytest.fixture(laid_out)

WORDS = ["one", "three", "fifteen", "x"]


def batch_of(event="", row=1):
    events = ["" if i != row else event for i in range(4)]
    columns = {"weight": [1.0, 2.0, 0.5, 3.0], "event": events}
    return RewardBatch(["p", "q", "", "rr"], WORDS, [[1]] * 4, [None] * 4, list("abcd"), [True] * 4, columns)


def scored(reward, batch):
    try:
        return reward.score(batch)
    finally:
        reward.close()


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_equal_scores_from_any_number_of_processes(folder, workers) -> None:
    reward = pooled("lengths", workers)
    try:
        assert reward.columns(["weight", "event"], "data") == ["weight"]
        for _ in range(2):
            assert reward.score(batch_of()) == [4.0, 12.0, 3.5, 9.0]
        assert len(reward.pids) == (workers or 1)
    finally:
        reward.close()
    assert scored(pooled("all_at_once", workers), batch_of()) == [1.0 if workers else 4.0] * 4


def test_processes_share_the_responses_and_live_on(folder) -> None:
    reward = pooled("pid", 2)
    try:
        first, second = reward.score(batch_of()), reward.score(batch_of())
        assert {*first, *second} <= {float(pid) for pid in reward.pids}
        assert os.getpid() not in first
    finally:
        reward.close()
    assert reward.pids == []


EVENTS = [
    ("exit", "ended the process with exit code 3"),
    ("leave", "ended the process with exit code 0"),
    ("sysexit", r"raised SystemExit: no more \(.*pooled\.py:12\)"),
    ("raise", r"raised ValueError: odd one \(.*pooled\.py:13\)"),
    ("kill", r"ended by SIGKILL \(out of memory\?\)"),
    ("close", "closed the file descriptors of its process"),
    ("daemon", "ended the process with exit code 4"),
    ("sleep", r"computed for more than 1 s \(.*pooled\.py:16\); make it faster, or raise reward.KEY"),
    ("native", "computed for more than 1 s.*; make it faster, or raise reward.KEY"),
    ("stubborn", r"computed for more than 1 s.*; make it faster, or raise reward.KEY"),
]


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize(("event", "words"), EVENTS)
def test_whatever_a_function_does_is_one_line(folder, workers, event, words) -> None:
    at = r" at response 2 of 4 \('three'\)" if workers else ""
    key = "response_timeout" if workers else "timeout"
    limit = {"response" if workers else "whole": 1.0} if "KEY" in words else {}
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"^reward.function pooled:at{at} {words.replace('KEY', key)}$"
    ) as raised:
        scored(pooled("at", workers, **limit), batch_of(event))
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 50  # nobody has waited for the function's minute


def test_a_score_that_is_none_names_its_row(folder) -> None:
    words = r"pooled:at gave nan for the response 'fifteen' \(3 of 4\)"
    with pytest.raises(UserError, match=words):
        scored(pooled("at", 2), batch_of("nan", 2))


@pytest.mark.parametrize("event", ["fork", "print", "child"])
def test_what_harms_nobody_is_let_be(folder, event, capfd) -> None:
    reward, err = pooled("at", None), ""
    try:
        assert reward.score(batch_of(event)) == [3.0, 5.0, 7.0, 1.0]
        until = time.monotonic() + 60  # a child says that it came back, which the scores do not wait for
        while event == "fork" and "came back" not in err and time.monotonic() < until:
            time.sleep(0.05)
            err += capfd.readouterr().err
    finally:
        reward.close()
    out, rest = capfd.readouterr()
    if event == "fork":
        line = "note: reward.function pooled:at forked, and the child came back: it ends here"
        assert line in err + rest
    if event == "print":
        assert "printed" in out
        assert "raw bytes" in out
        assert "on stderr" in rest


@pytest.mark.parametrize("event", ["sleep", "stubborn"])
def test_a_response_that_takes_too_long_may_have_a_score(folder, event, capfd) -> None:
    reward = pooled("at", 2, response=1.0, late_score=-1.0)
    try:
        assert reward.score(batch_of(event)) == [3.0, -1.0, 7.0, 1.0]
        assert reward.score(batch_of()) == [3.0, 5.0, 7.0, 1.0]
    finally:
        reward.close()
    assert capfd.readouterr().err.count("; it scores -1\n") == 1


def test_a_batch_has_a_limit_of_its_own(folder) -> None:
    words = r"pooled:at computed for more than 1 s \(\d of 4 responses\); .* or raise reward.timeout"
    with pytest.raises(UserError, match=words):
        scored(pooled("at", 2, whole=1.0), batch_of("sleep"))


def test_a_process_killed_from_outside_is_named_and_the_pool_closes(folder) -> None:
    reward = pooled("at", 1)
    assert reward.parameters.required == ("responses", "ids", "event")
    (pid,) = reward.pids
    threading.Timer(0.5, os.kill, (pid, 9)).start()
    with pytest.raises(UserError, match=r"at response 2 of 4 \('three'\) ended by SIGKILL"):
        reward.score(batch_of("sleep"))
    assert reward.pids == []


@pytest.mark.parametrize("event", ["raise", "nan"])
def test_no_process_outlives_an_error(folder, event) -> None:
    reward = pooled("at", 2)
    with pytest.raises(UserError):
        reward.score(batch_of(event))
    assert reward.pids == []


def test_no_process_outlives_a_function_that_is_not_there(folder) -> None:
    reward = pooled("absent", 2)
    with pytest.raises(UserError, match="has no function absent"):
        _ = reward.parameters
    assert reward.pids == []
