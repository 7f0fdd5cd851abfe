"""What is said of rewards that go wrong: how long, of which response; and when a server is asked again."""

from __future__ import annotations

import io
import math
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from puzzle.errors import UserError
from puzzle.rlhf.patience import Patience, patience
from puzzle.rlhf.rewards import server as module
from puzzle.rlhf.rewards import weighted
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.functions import FunctionReward
from puzzle.rlhf.rewards.scores import checked_scores, shown
from puzzle.rlhf.rewards.server import Limits, ServerReward
from puzzle.rlhf.rewards.weighted import pickled_function, unpickled_function
from tests.rlhf.one_process import INIT, configured


def batch_of(*responses: str) -> RewardBatch:
    count = len(responses)
    ids = [str(row) for row in range(count)]
    return RewardBatch(["p"] * count, list(responses), [[1]] * count, [None] * count, ids, [True] * count)


def raised(text: str) -> str:
    """What is said of a function that raises `text`, without the function's name and place."""

    def fails(responses: list[str]) -> list[float]:
        raise ValueError(text)

    with pytest.raises(UserError) as error:
        FunctionReward("given", function=fails).score(batch_of("one", "two"))
    return str(error.value).removeprefix("reward.function given raised ").rpartition(" (")[0]


def at_the_bottom(text: str) -> str:
    return module._reason(ValueError(text))


@pytest.mark.parametrize(
    ("said", "around", "most"), [(raised, "ValueError: ", 300), (shown, "''", 40), (at_the_bottom, "", 200)]
)
@pytest.mark.parametrize("over", [-1, 0, 1, 50])
def test_long_texts_are_cut_to_their_limit(
    said: Callable[[str], str], around: str, most: int, over: int
) -> None:
    """Dots say that something is missing, and only then."""
    text = "ab" * 400
    text = text[: most + over - len(around)]
    found = said(text)
    whole = repr(text) if around == "''" else around + text
    assert len(whole) == most + over
    assert found == (whole if over <= 0 else whole[: most - 3] + "...")


@pytest.mark.parametrize(
    ("responses", "first", "of", "at"),
    [
        (("one",), 0, 0, ""),
        (("one",), 0, 1, " at response 1 of 1 ('one')"),
        (("one",), 4, 9, " at response 5 of 9 ('one')"),
        (("one", "two"), 0, 0, ""),
        (("one", "two"), 4, 9, ""),
    ],
)
def test_a_call_with_one_response_of_a_batch_names_it(
    responses: tuple[str, ...], first: int, of: int, at: str
) -> None:
    def fails(responses: list[str]) -> list[float]:
        raise ValueError("odd")

    reward, more = FunctionReward("given", function=fails), () if not of else (first, of)
    with pytest.raises(UserError) as error:
        reward.score(batch_of(*responses), *more)
    assert str(error.value).startswith(f"reward.function given{at} raised ValueError: odd (")


@pytest.mark.parametrize(("first", "of", "at"), [(0, 0, "2 of 2"), (0, 9, "2 of 9"), (4, 9, "6 of 9")])
def test_the_number_of_a_response_is_counted_in_its_batch(first: int, of: int, at: str) -> None:
    with pytest.raises(UserError, match=rf"^f gave None for the response 'two' \({at}\)$"):
        checked_scores("f", [1.0, None], ["one", "two"], first, of)


class Slow(io.StringIO):
    """A stream that takes its time."""

    def write(self, text: str) -> int:
        time.sleep(0.5)
        return super().write(text)


def test_nobody_watches_a_function_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the notice of it is still on its way: what comes next could be interrupted."""
    said = Slow()
    monkeypatch.setattr(sys, "stderr", said)
    before = set(threading.enumerate())
    with patience("the function", Patience(limit=60.0, notice=0.05)):
        time.sleep(0.2)  # longer than until the notice, shorter than that takes
    assert set(threading.enumerate()) <= before
    assert said.getvalue().startswith("the function has computed for 0.05 s (")
    assert said.getvalue().endswith("; reward.timeout: 60 s\n")


NOTEBOOK = """
going = (line for line in "ab")  # which no other process can be sent
scale = 3.0
def helper(text): return scale * len(text)
def score(responses): return [helper(text) for text in responses]
"""


def test_a_function_takes_along_what_it_reads_and_no_more() -> None:
    """Of a notebook's cells, where other things lie about."""
    pytest.importorskip("dill")
    cells = types.ModuleType("__main__")
    exec(NOTEBOOK, cells.__dict__)
    for function in (cells.score, lambda responses: [2.0 for _ in responses]):
        there = unpickled_function(pickled_function(function))
        assert there is not function
        assert there(["a", "bcd"]) == function(["a", "bcd"])


def server(
    monkeypatch: pytest.MonkeyPatch, post: Callable[..., Any], **limits: Any
) -> tuple[ServerReward, Any]:
    """One that is asked by `post`, and the seconds that are waited between."""
    pytest.importorskip("requests")
    waited: list[float] = []
    reward = ServerReward("http://127.0.0.1:1/s", None, None, Limits(**limits))
    monkeypatch.setattr(reward, "_post", post)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=waited.append))
    return reward, waited


@pytest.mark.parametrize("retries", [0, 1, 8])
def test_twice_as_long_is_waited_each_time_up_to_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    def post(_body: bytes, _end: float) -> bytes:
        raise module._Failed("busy")

    reward, waited = server(monkeypatch, post, retries=retries)
    with pytest.raises(UserError, match=rf"/s failed{f' {retries + 1} times' if retries else ''}: busy$"):
        reward.score(batch_of("one"))
    assert waited == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0][:retries]


@pytest.mark.parametrize(("batch", "asked"), [(None, 4), (2.0, 3), (1.5, 2), (0.1, 1)])
def test_a_server_is_not_waited_for_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, batch: float | None, asked: int
) -> None:
    """There are 0.5, 1 and 2 seconds between requests; a wait that would end too late is none."""
    ends: list[float] = []
    now = [100.0]

    def post(_body: bytes, end: float) -> bytes:
        ends.append(end)
        raise module._Failed("busy")

    reward, _ = server(monkeypatch, post, batch=batch, retries=3)
    clock = types.SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(module, "time", clock)
    with pytest.raises(UserError, match="failed 4 times" if batch is None else "no scores in time"):
        reward.score(batch_of("one"))
    assert ends == [float("inf") if batch is None else 100.0 + batch] * asked


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 429, 500, 501, 502, 503, 504, 505])
def test_only_answers_that_mean_later_are_asked_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    reward = server(monkeypatch, lambda *_: b"")[0]
    monkeypatch.undo()

    class Answer(types.SimpleNamespace):
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    body = io.BytesIO(b"")
    raw = types.SimpleNamespace(read1=lambda size, decode_content: body.read(size))
    answer = Answer(status_code=status, reason="Why", raw=raw)
    monkeypatch.setattr(reward._session, "post", lambda *_, **__: answer)
    again = status in {408, 429, 500, 502, 503, 504}
    with pytest.raises(module._Failed if again else UserError, match=f"it answered {status} Why") as found:
        reward._post(b"", float("inf"))
    assert ("reward.token_env" in str(found.value)) == (status in {401, 403})


def test_the_reason_of_an_error_is_the_innermost_one() -> None:
    """By its cause, its context, or as urllib3 keeps it; texts there are none."""
    inner = OSError("no\n route")
    outer = ValueError("outer")
    outer.__cause__ = ValueError("between")
    outer.__cause__.__context__ = inner
    assert module._reason(outer) == "no route"
    kept = ValueError("kept")
    kept.reason = inner  # ty: ignore[missing-attribute]
    assert module._reason(kept) == "no route"
    kept.reason = "a text"  # ty: ignore[missing-attribute]
    assert module._reason(kept) == "kept"
    assert module._reason(TimeoutError()) == "TimeoutError"


def test_scores_are_those_that_float32_holds() -> None:
    largest = float(np.finfo(np.float32).max)
    assert checked_scores("f", [largest, -largest], ["one", "two"]) == [largest, -largest]
    for beyond in (math.nextafter(largest, math.inf), -math.nextafter(largest, math.inf), 1e300):
        with pytest.raises(UserError, match=r"float32 ends at 3\.4e\+38, scale or clip it$"):
            checked_scores("f", [beyond], ["one"])
    for nothing in (math.inf, math.nan):
        with pytest.raises(UserError, match=r"\(1 of 1\)$"):
            checked_scores("f", [nothing], ["one"])


@pytest.mark.parametrize("size", [0, 1, 8, 9, 20])
def test_an_answer_has_a_largest_size_and_a_time(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Read in parts, of which none is lost."""
    monkeypatch.setattr(module, "MOST_BYTES", 8)
    reward = server(monkeypatch, lambda *_: b"")[0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: 5.0))
    whole = bytes(range(size))

    def answer() -> Any:
        parts = io.BytesIO(whole)
        return types.SimpleNamespace(
            raw=types.SimpleNamespace(read1=lambda _, decode_content: parts.read(4 if decode_content else 0))
        )

    if size > 8:
        with pytest.raises(UserError, match=r"^answered more than 0 MiB"):
            reward._read(answer(), 6.0)
        return
    assert reward._read(answer(), 6.0) == whole
    if size:
        with pytest.raises(module._Failed, match="too slowly"):
            reward._read(answer(), 5.0)


def test_a_probe_knows_named_functions_and_leaves_given_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, also where the run itself would call it."""
    made: list[tuple[str, int | None]] = []

    def pool(setup: Any, workers: int | None, _limits: Any) -> Any:
        made.append((setup.name, workers))
        return types.SimpleNamespace(each=False)

    monkeypatch.setattr(weighted, "PoolReward", pool)

    def probed(**section: Any) -> list[str] | None:
        config = configured()
        reward = type(config.reward).model_validate(section)
        rewards = weighted.probe(config.model_copy(update={"reward": reward}))
        return None if rewards is None else [part.name for part in rewards.parts]

    functions = [{"function": "m:a"}, {"function": "given"}, {"function": "m:b", "name": "c"}]
    assert probed(functions=functions) == ["a", "c"]
    assert probed(function="given") is None
    assert probed(init=INIT) is None
    assert probed(function="m:f", workers=0) == ["f"]
    assert probed(function="m:f", workers=3) == ["f"]
    assert made == [("m:a", None), ("m:b", None), ("m:f", None), ("m:f", 3)]


def test_a_function_that_calls_the_handler_of_interrupts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is not the handler of this process: nobody has interrupted it."""

    def interrupts(responses: list[str]) -> list[float]:
        signal.default_int_handler(signal.SIGINT, None)
        raise AssertionError

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=r"^reward.function given raised KeyboardInterrupt"):
            FunctionReward("given", function=interrupts).score(batch_of("one", "two"))
    finally:
        signal.signal(signal.SIGINT, before)
