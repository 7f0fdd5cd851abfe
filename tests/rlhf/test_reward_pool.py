"""Reward functions in processes of their own, alone and beside one another, and runs that have several."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from puzzle.cli import main
from puzzle.cli.train import start
from puzzle.config.load import load_config
from puzzle.errors import UserError
from puzzle.plan.simulate.timeline import Timeline
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.pool import Limits, PoolReward
from puzzle.rlhf.rewards.worker import Setup
from puzzle.runlog import load_runs

MODULE = """
import ctypes, os, signal, subprocess, sys, time
def lengths(prompts, responses, weight):
    return [w * len(p + r) for p, r, w in zip(prompts, responses, weight)]
def vowels(responses): return [sum(c in "aeiou" for c in r) for r in responses]
def pid(responses): time.sleep(0.05); return [os.getpid()] * len(responses)
def all_at_once(responses): return [len(responses)] * len(responses)
def at(responses, ids, event):
    for response, what in zip(responses, event):
        if what == "exit": os._exit(3)
        if what == "leave": os._exit(0)
        if what == "sysexit": sys.exit("no more")
        if what == "raise": raise ValueError("odd one")
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "close": os.closerange(3, 1024)
        if what == "sleep": time.sleep(60)
        if what == "nan": return [float("nan")]
        if what == "native": ctypes.PyDLL(None).usleep(60_000_000)
        if what == "stubborn":
            while True:
                try: time.sleep(60)
                except BaseException: pass
        if what == "fork": os.fork()
        if what == "daemon":
            if not os.fork():
                os.setsid(); time.sleep(60); os._exit(0)
            os._exit(4)
        if what == "print":
            print("printed"); print("on stderr", file=sys.stderr); os.write(1, b"raw bytes"); sys.stdin.read()
        if what == "child": subprocess.run([sys.executable, "-c", "pass"], check=True)
    return [float(len(r)) for r in responses]
def slow(responses): time.sleep(0.5); return [0.0] * len(responses)
"""
WORDS = ["one", "three", "fifteen", "x"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "pooled.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("puzzle.rlhf.rewards.pool.GRACE_SECONDS", 3.0)
    yield tmp_path
    sys.modules.pop("pooled", None)


def batch_of(event="", row=1):
    events = ["" if i != row else event for i in range(4)]
    columns = {"weight": [1.0, 2.0, 0.5, 3.0], "event": events}
    return RewardBatch(["p", "q", "", "rr"], WORDS, [[1]] * 4, [None] * 4, list("abcd"), [True] * 4, columns)


def pooled(name, workers, response=None, whole=None, late_score=None):
    limit, key = (response, "reward.response_timeout") if workers else (whole, "reward.timeout")
    setup = Setup(f"pooled:{name}", limit, 60.0, key)
    return PoolReward(setup, workers, Limits(whole, response, 60.0, late_score))


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


CONFIG = """\
iterations: 2
batch: 2
seed: 4
actor:
  init: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
         num_attention_heads: 2, max_position_embeddings: 64}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 24}
generation: {max_new_tokens: 3, samples: 2}
log: {plots: false}
"""
BOTH = (
    '[{"function": "pooled:vowels", "weight": 2.0},'
    ' {"function": "pooled:lengths", "weight": -0.5, "name": "long"}]'
)


@pytest.fixture
def train(folder, capfd):
    """Runs the command; gives exit code and stderr."""
    (folder / "run.yaml").write_text(CONFIG)
    rows = [{"prompt": f"number {i}", "weight": 1 + i, "event": ""} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, *options):
        code = main(["train", "--config", "run.yaml", "--out", out, *options])
        return code, capfd.readouterr().err

    return run


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def metrics(folder):
    (run,) = load_runs(folder).runs
    return [dict(iteration.metrics) for iteration in run.iterations]


def test_several_rewards_are_added_and_logged_by_name(folder, train) -> None:
    """The sum of weighted parts, beside a reward model too; each by its name in log and samples."""
    code, err = train("functions", "--reward.functions", BOTH)
    assert (code, err) == (0, "")
    rows = samples(folder / "functions")
    assert len(rows) == 8
    for row in rows:
        text, weight = row["response"], 1 + int(row["prompt"][-1])
        parts = {"vowels": sum(c in "aeiou" for c in text), "long": weight * len(row["prompt"] + text)}
        assert row["rewards"] == parts
        assert row["reward"] == np.float32(2.0 * parts["vowels"] - 0.5 * parts["long"])
    for number, found in enumerate(metrics(folder / "functions")):
        ours = [row["rewards"]["long"] for row in rows if row["iteration"] == number]
        assert found["reward.long"] == pytest.approx(np.mean(ours))
        assert (found["reward_min.long"], found["reward_max.long"]) == (min(ours), max(ours))
    shape = '{"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, '
    shape += '"num_attention_heads": 2, "max_position_embeddings": 64}'
    options = ("--reward.functions", BOTH, "--reward.init", shape, "--reward.weight", "3")
    assert train("model", *options) == (0, "")
    assert train("alone", "--reward.init", shape) == (0, "")
    alone = {
        (r["prompt"], r["response"]): r["reward"] for r in samples(folder / "alone") if not r["iteration"]
    }
    for row in [row for row in samples(folder / "model") if not row["iteration"]]:
        parts = row["rewards"]
        assert (
            parts["model"] == alone[row["prompt"], row["response"]]
        )  # the same noise, the same first policy
        total = 3 * parts["model"] + 2 * parts["vowels"] - 0.5 * parts["long"]
        assert row["reward"] == pytest.approx(total, rel=1e-6)


def test_parts_stay_with_their_responses_where_groups_are_drawn_again(folder, train) -> None:
    """Dynamic sampling scores before inference, and puts a batch together of several draws."""
    options = ("--algorithm.name", "grpo", "--algorithm.dynamic_sampling.rounds", "2")
    assert train("out", "--reward.functions", BOTH, *options) == (0, "")
    (run,) = load_runs(folder / "out").runs
    assert max(found.metrics["sampling_rounds"] for found in run.iterations) > 0
    for row in samples(folder / "out"):
        text, weight = row["response"], 1 + int(row["prompt"][-1])
        parts = {"vowels": sum(c in "aeiou" for c in text), "long": weight * len(row["prompt"] + text)}
        assert row["rewards"] == parts
        assert row["reward"] == np.float32(2.0 * parts["vowels"] - 0.5 * parts["long"])
    for found in run.iterations:
        assert found.reward_seconds is not None
        assert found.reward_seconds["computed"] > 0


def test_equal_runs_however_functions_are_called(folder, train) -> None:
    """In the trainer, in one process, in several, under two ranks, and resumed in between."""
    options = ("--reward.functions", BOTH, "--checkpoint.every", "1", "--iterations", "2")
    found = {}
    for name, more in {
        "whole": (),
        "trainer": ("--reward.workers", "0"),
        "three": ("--reward.workers", "3", "--reward.response_timeout", "100"),
        "ranks": ("--layout.dp", "2", "--reward.workers", "1"),
    }.items():
        assert train(name, *options, *more) == (0, ""), name
        found[name] = samples(folder / name)
    assert found["whole"] == found["trainer"] == found["three"]
    assert [(r["response"], r["reward"]) for r in found["ranks"]] == [
        (r["response"], r["reward"]) for r in found["whole"]
    ]
    assert train("resumed", *options, "--iterations", "1", "--reward.workers", "2") == (0, "")
    code, _ = train("resumed", *options, "--resume", "--reward.workers", "2")
    assert code == 0
    assert samples(folder / "resumed") == found["whole"]
    whole = metrics(folder / "whole")
    assert metrics(folder / "trainer") == metrics(folder / "three") == whole == metrics(folder / "resumed")


def test_functions_compute_beside_inference(folder, train) -> None:
    """The trace has them in lanes of their own, which begin before inference has ended; the record says what
    was computed and waited for."""
    both = '[{"function": "pooled:slow"}, {"function": "pooled:vowels"}]'
    code, err = train("out", "--reward.functions", both, "--log.trace", "[1]")
    assert (code, err) == (0, "")
    timeline = Timeline.from_perfetto(json.loads((folder / "out/traces/iteration-1.json").read_text()))
    lanes = {span.lane: span for span in timeline.spans if span.lane.startswith("reward ")}
    assert set(lanes) == {"reward slow", "reward vowels", "reward wait"}
    stages = {span.name: span for span in timeline.spans if span.lane == "stage"}
    passes = [s for s in timeline.spans if s.model in ("reference", "critic") and s.category == "forward"]
    inferred = [s for s in passes if s.start < stages["inference"].end]
    assert {span.model for span in inferred} == {"reference", "critic"}
    slow = lanes["reward slow"]
    assert slow.seconds >= 0.5
    assert slow.start < min(span.start for span in inferred)  # it had begun before any model did
    assert slow.end > max(span.end for span in inferred)
    # Two functions of which one takes half a second overlap each other, too.
    assert lanes["reward vowels"].start < slow.end
    (run,) = load_runs(folder / "out").runs
    for iteration in run.iterations:
        seconds = iteration.reward_seconds
        assert seconds is not None
        assert seconds["computed"] >= 0.5
        assert 0 < seconds["waited"] <= seconds["computed"] + 0.5
    hidden = lanes["reward wait"].start - slow.start
    assert seconds["computed"] - seconds["waited"] == pytest.approx(hidden, abs=0.2)


def test_the_shipped_trace_hides_a_sleeping_function() -> None:
    """What logs/README.md says of it."""
    shipped = Path(__file__).parents[2] / "logs/rewards"
    timeline = Timeline.from_perfetto(json.loads((shipped / "traces/iteration-3.json").read_text()))
    spans = {(span.lane, span.name): span for span in timeline.spans}
    slow, inference = spans["reward slow", "slow"], spans["stage", "inference"]
    assert inference.start < slow.start < slow.start + 0.6 < slow.end < inference.end
    (run,) = load_runs(shipped).runs
    seconds = [iteration.reward_seconds or {} for iteration in run.iterations]
    assert [0.62 < found["computed"] < 0.7 for found in seconds] == [True] * 4
    assert max(found["waited"] for found in seconds) < 1e-4


def test_a_callable_of_python(folder, train) -> None:
    """In the starting process, in one of its own, and on several ranks; what nobody gave is missed."""
    calls, offset = [], 5.0

    def graded(responses, weight):
        calls.append(len(responses))
        return [offset + w for w in weight]

    def run(name, *options):
        config = load_config(Path("run.yaml"), ["--reward.function", "given", *options])
        assert start(config, folder / name, reward=graded) == 0
        return [row["reward"] for row in samples(folder / name)]

    here = run("here", "--reward.workers", "0")
    assert calls == [4, 4]
    assert here == [6.0 + int(row["prompt"][-1]) for row in samples(folder / "here")]
    assert run("apart") == run("ranks", "--layout.dp", "2") == run("each", "--reward.workers", "2") == here
    assert calls == [4, 4]
    code, err = train("out", "--reward.function", "given")
    assert code == 2
    assert "reward.function given: it stands for a callable that Python gives" in err
    with pytest.raises(UserError, match="given from Python, but the configuration names another"):
        start(
            load_config(Path("run.yaml"), ["--reward.function", "pooled:vowels"]), folder / "o", reward=graded
        )
    endless = (1.0 for _ in iter(int, 1))  # a generator, which no process can send another
    with pytest.raises(UserError, match="cannot be pickled for another process"):
        start(
            load_config(Path("run.yaml"), ["--reward.function", "given"]),
            folder / "o",
            reward=lambda responses: [next(endless)] * len(responses),
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--reward.function", "pooled:vowels", "--reward.functions", BOTH],
            "function or url (one reward), or",
        ),
        (["--reward.functions", BOTH.replace("long", "vowels")], "two are called 'vowels'; give each a name"),
        (["--reward.functions", '[{"weight": 1.0}]'], "function or url, one of them"),
        (
            ["--reward.functions", '[{"function": "a:b", "wieght": 1}]'],
            "functions.0.wieght: unknown",
        ),
        (["--reward.functions", '[{"url": "ftp://x"}]'], "expected http://HOST"),
        (["--reward.url", "http://me:secret@host/"], "the log would show its password"),
        (["--reward.function", "a:b", "--reward.response_timeout", "3"], "give workers"),
        (
            ["--reward.function", "a:b", "--reward.workers", "2", "--reward.timeout_score", "0"],
            "response_timeout",
        ),
        (["--reward.function", "a:b", "--reward.token_env", "T"], "there is no url"),
        (["--reward.function", "a:b", "--reward.weight", "2"], "is that of a model's score"),
    ],
)
def test_what_does_not_fit_is_refused(train, options, words) -> None:
    code, err = train("out", *options)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
