"""The writer: what it writes, what it refuses, and that a log survives whatever happens to its writer."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.files import lock
from puzzle.runlog import Run, RunWriter, load_runs
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.records import (
    Checkpoint,
    End,
    Iteration,
    Rank,
    Resume,
    Simulation,
    Stage,
    Switch,
    Trace,
    Warned,
)
from tests.runlog import texts


def write(folder, count=3, variant="opt", **header):
    with RunWriter(folder, texts.header(variant=variant, **header)) as writer:
        writer.write(Rank(0, coordinates={"training": [0, 0, 0]}, parameter_bytes=1024, device="cpu"))
        writer.write(Stage("training", "1f1b", "9a", actions={"forward": 8}, flushes=1, bubble_share=0.25))
        writer.write(Simulation(1, "training", {"apart": 3.0, "fused": 2.0}))
        for index in range(count):
            parts, e2e = texts.stages(1.5 + index, 0.5, 2.0, switch=0.25, other=0.125)
            more = {"bytes": 4096, "lower_bound_bytes": 4096, "local_share": 0.5}
            writer.write(Switch(index, 0.25, fields=more))
            writer.write(
                Iteration(
                    index, parts, e2e, {"reward": 0.5, "actor_loss": 1.0, "critic_loss": 2.0, "kl": 0.1}
                )
            )
        writer.sample(0, "Why?", "Because.", score=math.nan)
        writer.write(Checkpoint(count - 1, "checkpoints/2", seconds=1.0, bytes=10))
        writer.write(Trace("trace.json", iteration=1))
        writer.write(Rank(0, collective_bytes={"all_reduce": 77}))
        writer.write(End("completed"))
    return folder


def read(folder):
    run = read_jsonl(folder / "run.jsonl")
    assert isinstance(run, Run), run
    return run


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


def test_a_folder_holds_one_run(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        RunWriter(tmp_path, texts.header())


def test_resume_goes_on_in_the_same_file(tmp_path):
    write(tmp_path)
    layouts = {"training": {"tp": 2, "pp": 1, "dp": 1}}
    with RunWriter(tmp_path, texts.header(run_id="other", layouts=layouts), resume=True) as writer:
        assert writer.run_id == "abc"
        writer.write(Resume(2, "checkpoints/1"))
        for index in (2, 3):
            parts, e2e = texts.stages(9.0, 0.5, 2.0)
            writer.write(Switch(index, 0.5))
            writer.write(Iteration(index, parts, e2e, {}))
    run = read(tmp_path)
    assert [one.stage_seconds["generation"] for one in run.iterations] == [1.5, 2.5, 9.0, 9.0]
    assert [(switch.iteration, switch.seconds) for switch in run.switches] == [
        (0, 0.25),
        (1, 0.25),
        (2, 0.5),
        (3, 0.5),
    ]
    assert [report.what for report in run.reports] == ["resumed at iteration 2 with other layouts"]
    assert not run.ended


@pytest.mark.parametrize(
    "changes", [{"variant": "base"}, {"cluster": "other"}, {"repeat": 1}, {"provenance": "measured"}]
)
def test_another_run_is_not_resumed(tmp_path, changes):
    write(tmp_path)
    with pytest.raises(UserError, match="holds a run with"):
        RunWriter(tmp_path, texts.header(**changes), resume=True)


def test_warnings_and_ends_say_when_and_why(tmp_path):
    with RunWriter(tmp_path, texts.header()) as writer:
        writer.write(Warned("odd", iteration=3))
        writer.write(Warned("at no time"))
        writer.write(End("failed", "no room"))
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [(one["text"], one.get("iteration")) for one in records[1:3]] == [("odd", 3), ("at no time", None)]
    assert (records[3]["status"], records[3]["text"]) == ("failed", "no room")
    said = (tmp_path / "run.log").read_text().splitlines()
    assert [line[20:] for line in said[-3:]] == [
        "warning: odd (iteration 3)",
        "warning: at no time",
        "end: failed: no room",
    ]


def test_a_resumed_log_has_no_empty_lines(tmp_path):
    """Only what was torn is closed with a newline."""
    for resume in (False, True, True):
        with RunWriter(tmp_path, texts.header(), resume=resume) as writer:
            if resume:
                writer.write(Resume(0))
            writer.write(Warned("odd"))
    for name in ("run.jsonl", "run.log"):
        assert all(line.strip() for line in (tmp_path / name).read_text().splitlines())


def test_a_closed_log_holds_no_file_open(tmp_path):
    """Nor does one whose end was written; both may be closed again."""
    for name in ("closed", "ended"):
        before = os.listdir("/proc/self/fd")
        writer = RunWriter(tmp_path / name, texts.header())
        assert len(os.listdir("/proc/self/fd")) == len(before) + 3
        writer.close() if name == "closed" else writer.write(End("completed"))
        assert len(os.listdir("/proc/self/fd")) == len(before)
        writer.close()


def test_resume_of_nothing_starts(tmp_path):
    with RunWriter(tmp_path, texts.header(), resume=True) as writer:
        writer.write(End("completed"))
    assert read(tmp_path).reports == ()


def test_a_log_cut_at_any_byte_reads_and_goes_on(tmp_path):
    whole = (write(tmp_path / "whole", count=2) / "run.jsonl").read_bytes()
    full = read(tmp_path / "whole")
    first_line = whole.index(b"\n")
    folder = tmp_path / "cut"
    for size in range(len(whole)):
        folder.mkdir(exist_ok=True)
        (folder / "run.jsonl").write_bytes(whole[:size])
        run = read_jsonl(folder / "run.jsonl")
        if size < first_line:
            assert not isinstance(run, Run)
        else:
            assert isinstance(run, Run)
            assert run.iterations == full.iterations[: len(run.iterations)]
            last = whole[:size].rsplit(b"\n", 1)[-1]
            torn = last not in (b"", whole.split(b"\n")[whole[:size].count(b"\n")])
            assert bool(run.reports) == torn, (size, run.reports)
        # Going on is slower to try: at every line's ends, and here and there between.
        if size % 29 and b"\n" not in whole[size - 2 : size + 2]:
            continue
        with RunWriter(folder, texts.header(), resume=True) as writer:
            writer.write(Resume(1))
            parts, e2e = texts.stages(7.0, 0.5, 2.0)
            writer.write(Iteration(1, parts, e2e, {}))
        after = read(folder)
        assert after.iterations[-1].stage_seconds["generation"] == 7.0
        assert not [report for report in after.reports if "missing before" in report.what]
        for name in ("run.jsonl", "run.log", "samples.jsonl"):
            (folder / name).unlink()


def test_a_killed_writer_leaves_a_readable_log(tmp_path):
    code = (
        "from pathlib import Path; from puzzle.runlog import RunWriter\n"
        "from puzzle.runlog.records import Iteration; from tests.runlog import texts\n"
        f"writer = RunWriter(Path({str(tmp_path)!r}), texts.header())\n"
        "for index in range(10**6):\n"
        "    writer.write(Iteration(index, *texts.stages(1.0 + index, 0.5, 2.0), {'kl': 0.5}))\n"
        "    if index == 20: print('go', flush=True)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run = read(tmp_path)
    assert len(run.iterations) > 20
    assert [one.stage_seconds["generation"] for one in run.iterations] == [
        1.0 + index for index in range(len(run.iterations))
    ]
    assert not run.ended


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path):
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"^cannot write .*run\.jsonl: No space left on device; free space"
    ) as error:
        RunWriter(tmp_path, texts.header(), resume=True)
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_tears_one_line(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path, texts.header())
    parts, e2e = texts.stages(1.0, 0.5, 2.0)
    writer.write(Iteration(0, parts, e2e, {}))
    real = os.write

    def full(descriptor, data):
        real(descriptor, data[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left"):
        writer.write(Iteration(1, parts, e2e, {}))
    monkeypatch.setattr(os, "write", real)
    writer.write(Iteration(2, parts, e2e, {}))
    writer.close()
    run = read(tmp_path)
    assert [one.iteration for one in run.iterations] == [0, 2]
    assert any("torn or damaged" in report.what for report in run.reports)
    assert any("iterations are missing" in report.what for report in run.reports)


def test_every_record_is_one_write(tmp_path, monkeypatch):
    written = []
    real = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: written.append(bytes(data)) or real(descriptor, data)
    )
    write(tmp_path, count=1)
    assert all(re.fullmatch(rb"[^\n].*\n", data, re.DOTALL) for data in written)
    assert sum(data.startswith(b'{"record"') for data in written) == (
        tmp_path / "run.jsonl"
    ).read_bytes().count(b"\n")


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunWriter(tmp_path / "file" / "run", texts.header())


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_the_umask_says_who_reads_and_writes_logs_and_locks(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with lock.hold(tmp_path / "run"):
            write(tmp_path / "run")
            modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").iterdir() if p.is_file()}
    finally:
        os.umask(before)
    assert {".lock", "run.jsonl", "run.log"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~mask}
