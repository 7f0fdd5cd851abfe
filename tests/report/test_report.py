"""The page about runs: what it tells against the logs themselves, and what it never does."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle.cli import main
from puzzle.errors import UserError
from puzzle.report.facts import differing
from puzzle.report.page import facts_of, html, markdown, summary
from puzzle.runlog import RunWriter
from puzzle.runlog.records import End, Evaluation, Iteration, Rank, Resume, Stage, Switch, Trace, Warned
from tests.runlog import texts

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "logs/node"
HOSTILE = '<script>alert("x")</script> | & \\ `'
VOID = {"meta", "br", "link", "img", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Elements and texts of a page; every element must be ended."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def written(folder: Path, count: int = 3, **header: Any) -> Path:
    """A run with all kinds of records that the page tells of."""
    given = {"iterations": count, "batch": 32, "seed": 7, "generation": {"samples": 2}}
    config = {**given, "global_batch_size": 64, "data": {}}
    with RunWriter(folder, texts.header(**{"config": config, "given": given, **header})) as log:
        log.write(Stage("generation", "ring", "a", bubble_share=0.25))
        log.write(Stage("training.actor", "1f1b", "b", bubble_share=0.1))
        log.write(Stage("training.critic", "1f1b", "c", bubble_share=0.3))
        for index in range(count):
            stages, e2e = texts.stages(1.0 + index, 0.5, 2.0)
            speed = {"tokens_per_device_second": 100.0 * index, "mfu_training": 0.1 * index}
            log.write(Iteration(index, stages, e2e, {"reward": float(index), "kl": 0.1}, speed=speed))
            for row in range(4):
                reward = index + row / 10
                log.sample(index, f"ask {row}", f"say {row} {HOSTILE}", reward=reward, prompt_id=row)
            log.write(Switch(index, 0.25 + index, fields={"bytes": 4096, "strategy": "planned"}))
        for done, shift in ((0, 0.0), (count, 1.0)):
            log.write(Evaluation(done, {"reward": 0.5 + shift, "reward_ci95": 0.1}))
            for row in range(5):
                reward = row * (1 if done else -1)
                said = f"then {row}" if done else f"first {row}"
                log.sample(done, f"held {row}", said, reward=reward, prompt_id=row, held_out=True)
        log.write(Warned(HOSTILE))
        log.write(Warned("twice"))
        log.write(Warned("twice"))
        log.write(Rank(0, peak_bytes={"training": 3 << 30}))
        log.write(Rank(1, peak_bytes={"training": 5 << 30, "generation": 1 << 30}))
        log.write(Trace("traces/iteration-1.json", 1))
        log.write(Trace("traces/gone.json", 1))
        log.write(End("completed"))
    (folder / "traces").mkdir()
    (folder / "traces/iteration-1.json").write_text("{}")
    return folder


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    """No script, nothing of another place; texts of models and logs are texts."""
    page = Page(html(facts_of([written(tmp_path / "run")]), tmp_path))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert page.links == ["run/run.jsonl", "run/traces/iteration-1.json"]
    assert page.text.count(HOSTILE) == 1 + 3 + 1  # the warning; best, worst: 2 each of 4, each with its tail
    assert "prefers-color-scheme: dark" in html(facts_of([tmp_path / "run"]), tmp_path)


def test_facts_are_those_of_the_log(tmp_path: Path) -> None:
    (facts,) = facts_of([written(tmp_path / "run")])
    assert [(s.key, s.value, s.default) for s in facts.settings] == [
        ("iterations", 3, 100),
        ("seed", 7, 0),
        ("generation.samples", 2, 1),
    ]
    stages = {stage.name: stage for stage in facts.stages}
    assert facts.seconds == 5.0
    assert {name: stage.seconds for name, stage in stages.items()} == {
        "generation": 2.5,
        "inference": 0.5,
        "training": 2.0,
    }
    assert [stages[n].share for n in stages] == [0.5, 0.1, 0.4]
    assert stages["generation"].bubble == 0.25
    assert stages["training"].bubble == pytest.approx(0.2)
    assert stages["training"].floor == pytest.approx(0.15 * 2.0)
    assert stages["inference"].floor is None
    assert facts.switch == {"seconds": 1.25, "bytes": 4096}
    assert "| bytes | 4.096 kB |" in markdown([facts], tmp_path)
    assert facts.warnings == [(HOSTILE, 1), ("twice", 2)]
    assert {m.name: m.measured for m in facts.memory if m.measured} == {
        "training": 5 << 30,
        "generation": 1 << 30,
    }
    best, worst = facts.best_and_worst
    assert [(s.iteration, s.reward) for s in best] == [(2, 2.3), (2, 2.2)]
    assert [(s.iteration, s.reward) for s in worst] == [(2, 2.0), (2, 2.1)]
    assert [(s.before, s.response, s.gained) for s in facts.changed] == [
        ("first 4", "then 4", 8),
        ("first 3", "then 3", 6),
        ("first 2", "then 2", 4),
    ]
    rows = dict(summary([facts]))
    assert rows["reward, first to last"] == ["0 to 2"]
    assert rows["held-out reward, before to after"] == ["0.5 to 1.5"]
    assert rows["tokens per second and device"] == ["150"]
    assert rows["began"] == ["2026-11-22 12:00:00 UTC"]
    assert "restarts" not in rows


@pytest.mark.parametrize("name", ["7b_7b_w_bulk_32_1-2-1", "13b_7b_wo_bulk_32_2-1-1"])
def test_a_run_of_two_gpus_beside_its_formula(name: str) -> None:
    """Peaks by the log's own lines; the formula is within a tenth of them, as docs/memory.md has it."""
    (facts,) = facts_of([NODE / name])
    peaks: dict[str, int] = {}
    seconds = []
    for line in (NODE / name / "run.jsonl").read_text().splitlines():
        record = json.loads(line)
        for stage, size in (record.get("peak_bytes") or {}).items() if record["record"] == "rank" else ():
            peaks[stage] = max(size, peaks.get(stage, 0))
        if record["record"] == "iteration":
            seconds.append(record["e2e_seconds"])
    assert facts.seconds == pytest.approx(np.mean(seconds[1:]))
    told = {stage.name: stage for stage in facts.memory}
    assert peaks.keys() <= told.keys()
    for stage, size in peaks.items():
        assert told[stage].measured == size
        assert told[stage].formula == pytest.approx(size, rel=0.1)


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    names = ["7b_7b_w_bulk_32_1-2-1", "7b_7b_wo_bulk_32_1-2-1"]
    runs = facts_of([NODE / name for name in names])
    assert [facts.label for facts in runs] == names
    assert set(differing(runs)) == {"intra.fuse_training", "log.variant"}
    text = html(runs, tmp_path)
    page = Page(text)
    assert "true" in page.text
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) > 10
    assert all("c0" in one and "c1" in one for one in charts)
    widths = [float(w) for w in re.findall(r'class="bar" style="width: ([\d.]+)%', text)]
    seconds = [facts.seconds or 0 for facts in runs]
    assert widths == pytest.approx([100 * s / max(seconds) for s in seconds], abs=0.01)


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    for place in ("a/run", "b/run"):
        written(tmp_path / place, run_id=place)
    assert [facts.label for facts in facts_of([tmp_path / "a", tmp_path / "b"])] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="the same run is given twice"):
        facts_of([tmp_path / "a", tmp_path / "a/run"])


def test_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    """Also while it runs: no end, a torn line of samples, an iteration that was done twice."""
    header = texts.header(config={"iterations": 4, "global_batch_size": 4, "data": {}})
    with RunWriter(tmp_path / "run", header) as log:
        for index in range(2):
            log.write(Iteration(index, *texts.stages(1.0, 0.5, 2.0), {"reward": 1.0}))
    with RunWriter(tmp_path / "run", header, resume=True) as log:
        log.write(Resume(1, "checkpoints/state-1"))
        log.write(Iteration(1, *texts.stages(1.0, 0.5, 2.0), {"reward": 5.0}))
    (tmp_path / "run/samples.jsonl").write_text('{"iteration": 1, "prompt": "a", "resp')
    (facts,) = facts_of([tmp_path / "run"])
    page = Page(html([facts], tmp_path))
    assert "not ended: it runs, or was killed" in page.text
    assert "went on at iteration 1 from checkpoints/state-1" in page.text
    assert facts.series("reward") == [(0.0, 1.0), (1.0, 5.0)]
    assert facts.best_and_worst == ([], [])
    assert dict(summary([facts]))["restarts"] == ["1"]


def test_settings_of_other_commands_have_their_own_defaults(tmp_path: Path) -> None:
    given = {"task": "sft", "data": {"examples": "chats.jsonl", "max_tokens": 1024}, "batch": 8}
    written(tmp_path / "run", config={**given, "iterations": 3, "global_batch_size": 8}, given=given)
    (facts,) = facts_of([tmp_path / "run"])
    told = [(one.key, one.value, one.default) for one in facts.settings]
    assert told == [("data.examples", "chats.jsonl", None), ("batch", 8, 32)]


def test_markdown_tables_are_even(tmp_path: Path) -> None:
    """Every line of a table has the columns of its first one, whatever a text holds."""
    runs = facts_of([written(tmp_path / "a", run_id="a"), written(tmp_path / "b", run_id="b")])
    for text in (markdown(runs, tmp_path), markdown(runs[:1], tmp_path)):
        assert "\n# " in f"\n{text}"
        assert HOSTILE not in text
        assert "<script>" not in text
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table
            assert re.match(r"\|.*\n\|(---\|)+\n", table)


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = written(tmp_path / "run")
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "report.html"), str(out / "report.md")]
    assert Page((out / "report.html").read_text()).text
    other = tmp_path / "page.html"
    assert main(["report", str(out), "--html", str(other)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.md", "run"]
    assert 'href="run/run.jsonl"' in other.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "absent does not exist"),
        (["."], "no readable run under ."),
        ([], "the following arguments are required: OUT"),
        (["run", "--html", "x", "--markdown", "x"], "are both x; name two files"),
    ],
)
def test_bad_requests_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "run" in words:
        written(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_published_logs_have_a_page_too(tmp_path: Path) -> None:
    runs = facts_of([ROOT / "logs/published/figure8"])[:2]
    assert Page(html(runs, tmp_path)).text


@pytest.mark.parametrize(
    ("count", "title"), [(1, "a0"), (2, "a0 and a1"), (3, "a0, a1 and a2"), (4, "4 runs")]
)
def test_titles_name_few_runs(tmp_path: Path, count: int, title: str) -> None:
    folders = [written(tmp_path / f"a{number}", 2, run_id=f"a{number}") for number in range(count)]
    assert f"<title>{title}</title>" in html(facts_of(folders), tmp_path)


def test_a_run_that_learns_from_examples_tells_of_its_losses(tmp_path: Path) -> None:
    """No reward is shown where there is none; held-out metrics are the evaluations' own."""
    with RunWriter(tmp_path / "run", texts.header()) as log:
        for index in range(3):
            stages, e2e = texts.stages(0.0, 0.0, 2.0)
            log.write(Iteration(index, stages, e2e, {"actor_loss": 3.0 - index}))
        for done in (0, 3):
            log.write(Evaluation(done, {"loss": 4.0 - done, "accuracy": done / 4}))
        log.write(End("completed"))
    (facts,) = facts_of([tmp_path / "run"])
    rows = dict(summary([facts]))
    assert not [name for name in rows if "reward" in name]
    assert rows["loss, first to last"] == ["3 to 1"]
    assert rows["held-out loss, before to after"] == ["4 to 1"]
    assert rows["held-out accuracy, before to after"] == ["0 to 0.75"]
    page = html([facts], tmp_path)
    assert "<figcaption>held-out loss</figcaption><svg" in page
    assert "held-out reward" not in page
