"""Runs whose rewards are functions in processes of their own, several at a time."""

import json
from pathlib import Path

import numpy as np
import pytest

from puzzle.cli import main
from puzzle.cli.train import start
from puzzle.config.load import load_config
from puzzle.errors import UserError
from puzzle.plan.simulate.timeline import Timeline
from puzzle.runlog import load_runs
from tests.rlhf.pooled import laid_out

folder = pytest.fixture(laid_out)


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
