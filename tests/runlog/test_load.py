"""Folders of logs: what is found, which of several logs of one run counts, and what is an error."""

import json
import os
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.runlog import Run, RunWriter, load_runs
from puzzle.runlog.published.read import log_name
from puzzle.runlog.records import Iteration
from tests.runlog import texts

PUZZLE = texts.as_bytes(texts.puzzle_lines())
CHAT = texts.as_bytes(texts.chat_lines())


def put(root, name, data=PUZZLE):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def ours(folder, count=2, scale=1.0, **changes):
    with RunWriter(folder, texts.header(**changes)) as writer:
        for index in range(count):
            parts, e2e = texts.stages(scale * (1.0 + index), 0.5, 2.0)
            writer.write(Iteration(index, parts, e2e, {"kl": 0.5}))
    return folder


def test_a_published_puzzle_log(tmp_path):
    path = put(tmp_path, "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log")
    (run,) = load_runs(tmp_path).runs
    assert run.reports == ()
    assert (run.run_id, run.figures, run.cluster) == ("figure8/orion/7b_350m_opt", ("figure8",), "orion")
    assert (run.variant, run.actor, run.critic, run.provenance) == ("opt", "7B", "350M", "published")
    assert run.source == str(path)
    assert run.started == "2024-04-29T20:35:57+08:00"
    assert run.layouts == {"training": {"tp": 1, "pp": 8, "dp": 1}, "generation": {"tp": 2, "pp": 4, "dp": 1}}
    assert run.config["global_batch_size"] == 128
    assert run.config["decode_microbatch"] == 64
    assert run.config["bulk"] is True
    assert run.printed["reshard"] == texts.RESHARDS
    assert run.printed["training"] == tuple(times[2] / 1000 for times in texts.PUZZLE_TIMES)
    assert run.iterations[1].stage_seconds == pytest.approx(
        {
            "generation": 7.367424 - texts.RESHARDS[1],
            "inference": 1.350157,
            "training": 4.242159,
            "switch": texts.RESHARDS[1],
            "other": 0.0,
        },
        abs=1e-9,
    )
    assert [switch.seconds for switch in run.switches] == list(texts.RESHARDS)


def test_a_published_chat_log(tmp_path):
    put(tmp_path, "figure12/phoenix/llama_7b_7b_dschat_2024-04-28T10:00:34+08:00.log", CHAT)
    (run,) = load_runs(tmp_path).runs
    generation, experience, ranks, e2e, gather = texts.CHAT_TIMES[1]
    assert run.iterations[1].stage_seconds == pytest.approx(
        {
            "generation": generation - gather,
            "inference": experience - generation,
            "training": max(ranks),
            "switch": gather,
            "other": e2e - experience - max(ranks),
        },
        abs=1e-8,
    )
    assert run.iterations[0].stage_seconds["other"] < 0
    # The last iteration has no engine line: it is no whole iteration, but its times were printed.
    assert [one.iteration for one in run.iterations] == [0, 1]
    assert "iteration 2 dropped" in run.reports[-1].what
    assert run.printed["e2e"] == (27.89, 25.86)
    assert run.printed["experience"] == tuple(times[1] for times in texts.CHAT_TIMES)
    assert run.layouts == {"training": {"tp": 1, "pp": 1, "dp": 8}}
    assert run.config == {"global_batch_size": 128, "micro_batch_size": 16}


def test_a_chat_log_without_times_per_rank(tmp_path):
    """Some logs print rounded figures only: the stages come from those."""
    lines = [
        line for line in texts.chat_lines() if not line.startswith(("Training time:", "Generation time:"))
    ]
    put(tmp_path, "figure8/phoenix/llama_7b_7b_dschat_2024-04-28T09:51:47+08:00.log", texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    generation, experience, ranks, _, gather = texts.CHAT_TIMES[1]
    stages = run.iterations[1].stage_seconds
    assert stages["generation"] == pytest.approx(generation - gather, abs=0.011)
    assert stages["inference"] == pytest.approx(experience - generation, abs=0.021)
    assert stages["training"] == pytest.approx(ranks[0], abs=0.0051)
    assert sum(stages.values()) == pytest.approx(25.86)
    assert set(run.printed) == {"e2e", "gather"}


def test_figure10_without_a_cluster_level_is_orion(tmp_path):
    put(tmp_path, "figure10/llama_13b_7b_64_8_2_1_wo_bulk_2024-05-05T13:43:54+0800.log")
    (run,) = load_runs(tmp_path).runs
    assert run.cluster == "orion"
    assert run.run_id == "figure10/orion/13b_7b_64_8_2_1_wo_bulk"
    assert run.config["global_batch_size"] == 64
    assert run.layouts["training"] == {"tp": 1, "pp": 8, "dp": 2}
    whats = [report.what for report in run.reports]
    assert "the name says global_batch_size 64, the log 128; the name counts" in whats
    assert "the name says data_parallel_size 2, the log 1; the name counts" in whats


@pytest.mark.parametrize(
    ("path", "meaning"),
    [
        (
            "figure9/phoenix/llama_13b_7b_w_bulk_2024-04-29T12:14:50+08:00.log",
            ("figure9", "phoenix", "w_bulk"),
        ),
        ("figure11/orion/llama_7b_7b_gen_opt_2024-04-30T15:44:47+0800.log", ("figure11", "orion", "gen_opt")),
        ("table3/orion/llama_33b_7b_opt_2024-04-30T14:16:53+0800.log", ("table3", "orion", "opt")),
        ("x/llama_33b_7b_opt_2024-04-30T14:16:53+0800.log", ("", "unknown", "opt")),
    ],
)
def test_names(tmp_path, path, meaning):
    name = log_name(tmp_path / path)
    assert name is not None
    assert (name.figure, name.cluster, name.variant) == meaning


@pytest.mark.parametrize(
    "name", ["run.log", "llama_7b_opt_2024-04-30T14:16:53+0800.log", "llama_7b_7b_opt.log"]
)
def test_other_names_are_no_published_logs(tmp_path, name):
    assert log_name(tmp_path / "figure8" / "orion" / name) is None


def test_the_newest_of_several_logs_counts_by_its_zone(tmp_path):
    folder = "figure8/orion/llama_7b_350m_opt_"
    early = put(tmp_path, f"{folder}2024-04-29T20:35:57+0800.log")
    late = put(tmp_path, f"{folder}2024-04-29T13:00:00+00:00.log", PUZZLE.replace(b"8337.611", b"8337.612"))
    loaded = load_runs(tmp_path)
    (run,) = loaded.runs
    assert run.source == str(late)
    (report,) = loaded.reports
    assert report.source == str(late)
    assert report.what == f"used for figure8/orion/7b_350m_opt: newer than {early}"


def test_a_time_that_is_none_never_counts_as_newer(tmp_path):
    good = put(tmp_path, "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log")
    put(tmp_path, "figure8/orion/llama_7b_350m_opt_2024-13-99T20:35:57+0800.log")
    (run,) = load_runs(tmp_path).runs
    assert run.source == str(good)


def test_a_tree_with_both_kinds_and_more(tmp_path):
    put(tmp_path, "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log")
    ours(tmp_path / "runs" / "a")
    ours(tmp_path / "runs" / "b", repeat=1)
    put(tmp_path, "runs/a/samples.jsonl", b"{}\n")
    put(tmp_path, "runs/a/slurm-7.log", b"hello\n")
    put(tmp_path, "prompts.jsonl", b'{"prompt": "Why?"}\n' * 5)
    put(tmp_path, "notes.log", b"hello\n")
    loaded = load_runs(tmp_path)
    assert sorted((run.run_id, run.repeat) for run in loaded.runs) == [
        ("abc", 0),
        ("abc", 1),
        ("figure8/orion/7b_350m_opt", 0),
    ]
    assert sorted(Path(report.source).name for report in loaded.reports) == ["notes.log", "prompts.jsonl"]


def test_one_log_alone(tmp_path):
    ours(tmp_path / "a")
    assert len(load_runs(tmp_path / "a" / "run.jsonl").runs) == 1


def test_a_copy_of_a_run_is_said(tmp_path):
    ours(tmp_path / "a", count=1)
    ours(tmp_path / "b", count=3)
    loaded = load_runs(tmp_path)
    (run,) = loaded.runs
    assert len(run.iterations) == 3
    assert "is a copy of it" in loaded.reports[0].what


@pytest.mark.parametrize(
    "changes", [{"variant": "base"}, {"config": {"iterations": 8, "global_batch_size": 32}}]
)
def test_two_runs_that_disagree_are_an_error(tmp_path, changes):
    ours(tmp_path / "a")
    ours(tmp_path / "b", **changes)
    with pytest.raises(
        UserError, match=r"are both repeat 0 of run abc and disagree on (variant|config); remove one"
    ):
        load_runs(tmp_path)


def test_two_runs_with_other_numbers_are_an_error(tmp_path):
    ours(tmp_path / "a")
    ours(tmp_path / "b", scale=2.0)
    with pytest.raises(UserError, match="hold other iterations; remove one"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        (None, b"", "no \\*.jsonl and no published"),
        ("run.jsonl", b"", "empty log"),
        ("run.jsonl", b"\x00\xff\n", "not text"),
        ("run.jsonl", b"hello\n", "not JSON"),
        ("run.jsonl", b'{"record":"run","seq":0,"schema":9}\n', "schema of run must be 1"),
        ("run.jsonl", b'{"record":"run","seq":0,"schema":NaN}\n', "NaN is no JSON number"),
        ("hello.log", PUZZLE, "not named like a published log"),
        ("figure8/orion/llama_7b_7b_opt_2024-04-29T20:35:57+0800.log", b"", "no readable iteration"),
        ("figure8/orion/llama_7b_7b_opt_2024-04-29T20:35:57+0800.log", b"hello\n", "no readable iteration"),
        ("figure8/orion/llama_7b_7b_opt_2024-04-29T20:35:57+0800.log", PUZZLE[:700], "no readable iteration"),
    ],
)
def test_nothing_readable_is_one_clear_line(tmp_path, name, data, what):
    if name is not None:
        put(tmp_path, name, data)
    with pytest.raises(UserError, match=what) as error:
        load_runs(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"no readable run under {tmp_path}")


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="does not exist; give the folder"):
        load_runs(tmp_path / "nowhere")


def test_a_file_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    ours(tmp_path / "a")
    closed = put(tmp_path, "b/run.jsonl", b"secret")
    real = Path.read_bytes

    def read_bytes(self):
        if self == closed:
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    loaded = load_runs(tmp_path)
    assert len(loaded.runs) == 1
    assert [(report.source, report.what) for report in loaded.reports] == [
        (str(closed), "cannot be read: Permission denied")
    ]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_devices_and_broken_links_are_not_read(tmp_path):
    ours(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.jsonl").symlink_to("/dev/zero")
    (tmp_path / "b" / "other.jsonl").symlink_to(tmp_path / "nowhere")
    loaded = load_runs(tmp_path)
    assert [report.what for report in loaded.reports] == ["not a regular file: not used"] * 2


def test_a_log_whose_arguments_are_anothers_is_doubted(tmp_path):
    lines = [line.replace(" True", " False") for line in texts.puzzle_lines()]
    put(tmp_path, "figure8/orion/llama_33b_7b_opt_2024-04-30T11:12:27+0800.log", texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    assert "re-sharding is off in the log's arguments" in run.reports[0].what
    assert run.layouts["generation"] == run.layouts["training"]


def test_transcribed_logs_name_their_source(tmp_path):
    ours(tmp_path)
    path = tmp_path / "run.jsonl"
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    del header["crc"]
    path.write_text("\n".join([json.dumps({**header, "log": {"name": "figure8/x.log"}}), *rest]) + "\n")
    (run,) = load_runs(tmp_path).runs
    assert isinstance(run, Run)
    assert run.source == "figure8/x.log"
