import io
import re
from pathlib import Path

from rich.console import Console

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.rlhf.console import Reporter
from puzzle.rlhf.provenance import run_header
from puzzle.runlog import RunWriter, load_runs
from puzzle.runlog.records import End, Evaluation, Iteration

SECONDS = {"generation": 1.0, "inference": 0.5, "training": 2.0, "switch": 0.0, "other": 0.25}
METRICS = {
    "reward": 0.25,
    "kl": 0.01,
    "actor_loss": -0.5,
    "critic_loss": 0.125,
    "response_tokens": 640.0,
    "logprob_gap_rms": 0.089,
}


def show(terminal: bool, **options) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=60, highlight=False)
    with Reporter(3, console=console, **options) as reporter:
        for iteration in range(options.get("done", 0), 3):
            reporter.iteration(iteration, SECONDS, 3.75, METRICS)
        reporter.evaluation(3, {"reward": 0.5})
    return text.getvalue()


def test_lines_without_a_terminal():
    lines = show(terminal=False).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[0].split() == [
        "iteration",
        "reward",
        "KL",
        "tokens",
        "gap",
        "nats",
        "actor",
        "loss",
        "critic",
        "loss",
        "gen",
        "s",
        "infer",
        "s",
        "train",
        "s",
        "total",
        "s",
        "left",
    ]
    assert lines[1].split()[:10] == [
        "1/3",
        "0.250",
        "0.0100",
        "640",
        "0.0890",
        "-0.5000",
        "0.1250",
        "1.00",
        "0.50",
        "2.00",
    ]
    assert lines[3].split()[-1] == "0:00"
    assert lines[4:] == ["  held out after 3 iterations: reward 0.5"]


def test_missing_and_tiny_numbers():
    text = io.StringIO()
    with Reporter(1, console=Console(file=text, width=40)) as reporter:
        reporter.iteration(0, SECONDS, 3.75, {"reward": -0.0004, "actor_loss": -0.00005})
    assert text.getvalue().splitlines()[1].split()[:7] == ["1/1", "0.000", "-", "-", "-", "-0.0001", "-"]


def test_bar_on_a_terminal_and_after_a_resume():
    shown = show(terminal=True, done=2)
    assert re.search(r"iteration.*3/3", shown)
    assert "1/3" not in shown


def test_header_and_log_of_a_run(tmp_path):
    config = TrainConfig.model_validate(
        {
            "actor": {"init": {"preset": "7b"}},
            "critic": {"init": {"preset": "350m"}, "layout": {"tp": 2, "dp": 1}},
            "reward": {"init": {"preset": "350m"}},
            "layout": {"dp": 2},
            "data": {"random_tokens": 8},
            "batch": 16,
            "generation": {"samples": 2},
            "iterations": 3,
            "log": {"figures": ["figure8"], "variant": "base", "provenance": "rehearsal", "repeat": 1},
        }
    )
    header = run_header(resolve(config), {"devices": ["cpu"]})
    assert (header.actor, header.critic, header.repeat) == ("7b", "350m", 1)
    assert set(header.layouts) == {"training", "generation", "critic", "reference", "reward"}
    assert header.layouts["training"] == {"tp": 1, "pp": 1, "dp": 2}
    assert header.layouts["critic"] == {"tp": 2, "pp": 1, "dp": 1}
    assert header.config["global_batch_size"] == 32
    assert header.software["torch"]
    with RunWriter(tmp_path, header) as writer:
        writer.write(Iteration(0, SECONDS, 3.75, METRICS))
        writer.write(Evaluation(0, {"reward": 0.5, "kl": float("nan")}))
        writer.write(Evaluation(1, {"reward": 0.75}))
        writer.write(End("completed"))
    [run] = load_runs(tmp_path).runs
    assert run.reports == ()
    assert run.config["generation"]["samples"] == 2
    assert [e.iteration for e in run.evaluations] == [0, 1]
    assert run.evaluations[1].metrics == {"reward": 0.75}
    assert "held out after 1 iterations: reward 0.75" in (tmp_path / "run.log").read_text()


def test_the_end_says_where_things_are(tmp_path, monkeypatch):
    """From the working folder where that is shorter, and as a shell reads it."""
    monkeypatch.chdir(tmp_path)
    text = io.StringIO()
    reporter = Reporter(3, console=Console(file=text, width=60))
    out = Path("my runs/first")
    reporter.ended(out, tmp_path / out / "checkpoints/last")
    reporter.ended(Path("/elsewhere/run"), None)
    assert text.getvalue().splitlines()[1:] == [
        "done: the model is my runs/first/checkpoints/last; `puzzle report 'my runs/first'` writes a "
        "page about the run",
        "done: `puzzle report /elsewhere/run` writes a page about the run",
    ]


def test_the_bar_goes_with_the_run_and_lines_stay():
    """What it erases at the end is the bar's own line."""
    shown = show(terminal=True)
    assert shown.endswith("\x1b[2K")
    assert shown.count("held out after 3 iterations") == 1


def test_numbers_have_no_colours(monkeypatch, capsys):
    """On a terminal, too: they are read in columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Reporter(2) as reporter:
        reporter.iteration(0, SECONDS, 3.75, METRICS)
    line = next(line for line in capsys.readouterr().out.splitlines() if "1/2" in line and "0.250" in line)
    assert "\x1b[1" not in line
    assert "\x1b[3" not in line
