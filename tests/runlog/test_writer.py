"""The writer: what it writes, what it refuses, and that a log survives whatever happens to its writer."""

import json
import math

import pytest

from puzzle.runlog import RunWriter, load_runs
from puzzle.runlog.records import (
    End,
    Iteration,
    Rank,
    Switch,
    Warned,
)
from tests.runlog import texts
from tests.runlog.writing import read, write


def test_what_is_written_is_read(tmp_path):
    run = read(write(tmp_path / "deep" / "run"))
    assert run.reports == ()
    assert run.ended
    assert (run.run_id, run.repeat, run.figures, run.provenance) == ("abc", 0, ("figure8",), "rehearsal")
    assert [one.iteration for one in run.iterations] == [0, 1, 2]
    assert run.iterations[1].stage_seconds == texts.stages(2.5, 0.5, 2.0, switch=0.25, other=0.125)[0]
    assert run.iterations[1].metrics["kl"] == 0.1
    assert run.switches[2].fields == {"bytes": 4096, "lower_bound_bytes": 4096, "local_share": 0.5}
    simulated = {"iteration": 1, "stage": "training", "seconds": {"apart": 3.0, "fused": 2.0}}
    assert run.simulations == (simulated,)
    assert run.ranks == (
        {
            "rank": 0,
            "coordinates": {"training": [0, 0, 0]},
            "parameter_bytes": 1024,
            "device": "cpu",
            "collective_bytes": {"all_reduce": 77},
        },
    )
    assert run.stages[0]["bubble_share"] == 0.25
    assert run.printed == {
        "e2e": (4.375, 5.375, 6.375),
        "generation": (1.75, 2.75, 3.75),
        "inference": (0.5,) * 3,
        "training": (2.0,) * 3,
        "reshard": (0.25,) * 3,
    }
    sample = json.loads((tmp_path / "deep" / "run" / "samples.jsonl").read_text())
    assert sample == {"iteration": 0, "prompt": "Why?", "response": "Because.", "score": None}


def test_the_log_for_people_has_the_published_lines(tmp_path):
    log = (write(tmp_path) / "run.log").read_text().splitlines()
    assert "apply shadow model time: 0.25" in log
    assert log[log.index("apply shadow model time: 0.25") + 1] == (
        "epoch: 0 | step: 0/8 | ppo_ep: 1 | global_batch_size: 16 | average_reward: 0.500 | act_loss: 1.000"
        " | cri_loss: 2.000 | stage 1(gen.) (ms): 1750.000 | stage 2(infer.) (ms): 500.000"
        " | stage 3(train.) (ms): 2000.000 | e2e_time (ms): 4375.000"
    )


@pytest.mark.parametrize("variant", ["opt", "base", "dschat"])
def test_the_log_for_people_reads_like_a_published_one(tmp_path, variant):
    """Both readers see the same run, within the decimals that the lines print."""
    ours = read(write(tmp_path / "ours", variant=variant))
    place = tmp_path / "figure8" / "local" / f"llama_7b_350m_{variant}_2026-11-22T12:00:00+0000.log"
    place.parent.mkdir(parents=True)
    place.write_bytes((tmp_path / "ours" / "run.log").read_bytes())
    (theirs,) = load_runs(tmp_path / "figure8").runs
    assert theirs.printed.keys() == ours.printed.keys()
    for name, values in ours.printed.items():
        assert theirs.printed[name] == pytest.approx(values, abs=0.0051 if variant == "dschat" else 1e-6), (
            name
        )
    for mine, other in zip(ours.iterations, theirs.iterations, strict=True):
        assert other.stage_seconds == pytest.approx(mine.stage_seconds, abs=0.0051)


@pytest.mark.parametrize("variant", ["opt", "dschat"])
def test_the_published_scripts_words_are_where_they_look(tmp_path, variant):
    """The words that the published plot scripts take out of a line, by their place."""
    lines = (write(tmp_path, variant=variant) / "run.log").read_text().splitlines()
    if variant == "opt":
        (first, *_) = [line.split(" ") for line in lines if "e2e_time" in line]
        assert [first[place] for place in (-1, -5, -10, -15)] == [
            "4375.000",
            "2000.000",
            "500.000",
            "1750.000",
        ]
    else:
        assert next(line for line in lines if "Training time:" in line).split()[-1] == "2.0"
        engine = next(line for line in lines if line.startswith("|E2E latency="))
        assert engine.split("|")[1:3] == ["E2E latency=4.38s ", "Gather latency=0.25s (5.71%) "]


def test_samples_keep_what_json_can_say(tmp_path):
    """Any fields beside prompt and response, in UTF-8; only numbers that JSON has not become null."""
    more = {"score": 0.25, "turns": ["a", None], "truth": "4", "cut": True, "gap": None, "n": 10**400}
    with RunWriter(tmp_path, texts.header()) as writer:
        writer.sample(3, "Wozu?", "Für \N{SNOWMAN}\nalle.", **more, low=-math.inf, odd=math.nan)
        writer.sample(4, "", "")
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "Für \N{SNOWMAN}\\nalle." in text
    first, second = map(json.loads, text.splitlines())
    told = {"iteration": 3, "prompt": "Wozu?", "response": "Für \N{SNOWMAN}\nalle."}
    assert first == {**told, **more, "low": None, "odd": None}
    assert second == {"iteration": 4, "prompt": "", "response": ""}


def test_lines_say_when_they_were_written(tmp_path, monkeypatch):
    """In milliseconds: digits beyond say nothing."""
    times = iter([1764000000.123456, 1764000001.0004, 1764000001.9996])
    monkeypatch.setattr("time.time", lambda: next(times))
    with RunWriter(tmp_path, texts.header()) as writer:
        writer.write(Warned("odd"))
        writer.write(End("completed"))
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [one["time"] for one in records] == [1764000000.123, 1764000001.0, 1764000002.0]
    assert [one["seq"] for one in records] == [0, 1, 2]


def test_nan_becomes_null_and_a_warning(tmp_path):
    with RunWriter(tmp_path, texts.header()) as writer:
        parts, e2e = texts.stages(1.0, 0.5, 2.0)
        writer.write(Iteration(0, parts, e2e, {"kl": math.nan, "reward": math.inf}))
    run = read(tmp_path)
    assert math.isnan(run.iterations[0].metrics["kl"])
    assert math.isnan(run.iterations[0].metrics["reward"])
    assert [report.what for report in run.reports] == [
        "the run warned: kl is nan",
        "the run warned: reward is inf",
    ]
    assert "average_reward: inf" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w.write(Iteration(0, texts.stages(1.0, 0.5, 2.0)[0], 3.6, {})),
        lambda w: w.write(Iteration(0, texts.stages(math.nan, 0.5, 2.0)[0], 3.5, {})),
        lambda w: w.write(Iteration(0, {"generation": 3.5}, 3.5, {})),
        lambda w: w.write(Iteration(0, {**texts.stages(1.0, 0.5, 2.0)[0], "lunch": 0.0}, 3.5, {})),
        lambda w: w.write(Iteration(-1, *texts.stages(1.0, 0.5, 2.0), {})),
        lambda w: w.write(Switch(0, -0.5)),
        lambda w: w.write(Switch(0, math.nan)),
        lambda w: w.write(Rank(0, parameter_bytes=-5)),
        lambda w: w.write(Warned("")),
    ],
)
def test_nonsense_is_refused_and_nothing_is_written(tmp_path, call):
    with RunWriter(tmp_path, texts.header()) as writer:
        before = [(tmp_path / name).read_bytes() for name in ("run.jsonl", "run.log")]
        with pytest.raises(ValueError):
            call(writer)
        assert before == [(tmp_path / name).read_bytes() for name in ("run.jsonl", "run.log")]


def test_the_config_must_say_how_much_an_iteration_is(tmp_path):
    with pytest.raises(ValueError, match="global_batch_size"):
        RunWriter(tmp_path, texts.header(config={"iterations": 3}))
