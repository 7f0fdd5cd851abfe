import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puzzle.errors import UserError
from puzzle.plotting import curves
from puzzle.plotting.selection import pair
from puzzle.runlog import RunHeader, RunWriter, load_runs
from puzzle.runlog.records import End, Evaluation, Iteration

stats = pytest.importorskip("scipy.stats")

STAGES = {"generation": 1.0, "inference": 0.0, "training": 0.0, "switch": 0.0, "other": 0.0}


def write_run(folder, rewards, seed=0, evaluations=(), variant="puzzle", provenance="measured"):
    header = RunHeader(
        run_id=f"{variant}-{seed}",
        figures=(),
        cluster="local",
        variant=variant,
        actor="tiny",
        critic="tiny",
        config={"iterations": len(rewards), "global_batch_size": 4, "seed": seed},
        layouts={},
        provenance=provenance,
        software={},
        hardware={},
        git_commit=None,
        started=None,
    )
    with RunWriter(folder, header) as writer:
        for iteration, reward in enumerate(rewards):
            writer.write(Iteration(iteration, STAGES, 1.0, {"reward": reward, "kl": 0.1 * iteration}))
        for iteration, metrics in evaluations:
            writer.write(Evaluation(iteration, metrics))
        writer.write(End("completed"))


def read(folder):
    with (folder / "curves.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29])
def test_student_quantile(freedom):
    assert curves.student_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-9)


def test_means_over_five_iterations_and_seeds(tmp_path):
    rewards = np.random.default_rng(0).normal(size=(3, 22))
    for seed in range(3):
        write_run(tmp_path / f"logs/{seed}", rewards[seed].tolist(), seed)
    assert curves.main(["--logs", str(tmp_path / "logs"), "--out", str(tmp_path / "out")]) == 0
    rows = [row for row in read(tmp_path / "out") if row["metric"] == "reward"]
    blocks = np.array([[seed[i : i + 5].mean() for i in range(0, 22, 5)] for seed in rewards])
    assert [float(row["iteration"]) for row in rows] == [2, 7, 12, 17, 20.5]
    assert [row["seeds"] for row in rows] == ["3"] * 5
    np.testing.assert_allclose([float(row["value"]) for row in rows], blocks.mean(0), rtol=1e-12)
    half = stats.sem(blocks, axis=0) * stats.t.ppf(0.975, 2)
    np.testing.assert_allclose([float(row["high"]) for row in rows], blocks.mean(0) + half, rtol=1e-9)
    np.testing.assert_allclose([float(row["low"]) for row in rows], blocks.mean(0) - half, rtol=1e-9)
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    assert (tmp_path / "out/curves.pdf").exists()


@pytest.mark.parametrize(("count", "ats"), [(3, [0, 1, 2]), (19, list(range(19))), (20, [2, 7, 12, 17])])
def test_short_runs_have_a_point_for_each_iteration(tmp_path, count, ats):
    """Three iterations in one point say nothing; the panels of a picture share their iterations."""
    write_run(
        tmp_path / "logs", list(range(count)), evaluations=[(0, {"reward": 1.0}), (count, {"reward": 2.0})]
    )
    assert curves.main(["--logs", str(tmp_path / "logs"), "--out", str(tmp_path / "out")]) == 0
    rows = [row for row in read(tmp_path / "out") if row["metric"] == "reward"]
    assert [float(row["iteration"]) for row in rows] == ats
    assert [float(row["value"]) for row in rows] == ats  # the reward is the number of the iteration
    runs = load_runs(tmp_path / "logs").runs
    block = curves.block_of(runs)
    grouped = curves.lines(runs)
    (name,) = grouped
    found = [p for metric in curves.METRICS for p in curves.points(name, grouped[name], metric, block)]
    figure = curves.draw(grouped, found, block)
    ((low, high),) = {axes.get_xlim() for axes in figure.axes}
    last = max(ats[-1], count)  # the held-out reward comes behind the last iteration
    assert -0.1 * last < low < 0
    assert last < high < 1.1 * last
    means = "means over 5; " if count >= 20 else ""
    assert figure.axes[-1].get_xlabel() == f"iteration ({means}shaded: 95 % interval)"
    assert {str(axes.lines[0].get_marker()) for axes in figure.axes} <= (
        {"o"} if count < 20 else {"o", "None"}
    )


def test_one_run_has_the_interval_of_its_log_and_gaps_stay_gaps(tmp_path):
    held_out = [(0, {"reward": 0.1, "reward_ci95": 0.05}), (2, {"reward": 0.5})]
    write_run(tmp_path / "a", [1.0, math.nan], evaluations=held_out)
    write_run(tmp_path / "b", [2.0], variant="other", provenance="rehearsal")
    assert curves.main(["--logs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out")
    assert {row["line"] for row in rows} == {"tiny/tiny puzzle local", "tiny/tiny other local (rehearsal)"}
    reward = [row for row in rows if row["metric"] == "reward" and "puzzle" in row["line"]]
    assert [(row["iteration"], row["value"], row["low"]) for row in reward] == [("0.0", "1.0", "")]
    out = [row for row in rows if row["metric"] == "held-out reward"]
    assert [(row["iteration"], row["value"]) for row in out] == [("0.0", "0.1"), ("2.0", "0.5")]
    assert float(out[0]["low"]) == pytest.approx(0.05)
    assert out[1]["low"] == ""


def test_what_is_no_number_to_draw_is_no_point(tmp_path):
    """Not a number, infinite, or beyond what an axis can hold; of every kind of metric, and of intervals."""
    odd = [math.nan, math.inf, -math.inf, 1e100, -1e100, 1e300]
    held_out = [(i, {"reward": value, "reward_ci95": 0.5}) for i, value in enumerate([*odd, 9e99])]
    held_out += [(7 + i, {"reward": 1.0, "reward_ci95": value}) for i, value in enumerate([*odd, 9e99])]
    write_run(tmp_path, [*odd, 9e99], evaluations=held_out)
    (run,) = load_runs(tmp_path).runs
    points = curves.points("one", [run], curves.HELD_OUT, 1)
    assert [(p.iteration, p.value) for p in points] == [(6, 9e99), *((at, 1.0) for at in range(7, 14))]
    assert [p.low is None for p in points] == [False, *[True] * 6, False]
    assert points[-1].high == 9e99 + 1.0
    assert [(p.iteration, p.value) for p in curves.points("one", [run], "reward", 1)] == [(6, 9e99)]


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 2.0]])
def test_runs_of_one_iteration_or_two_have_an_axis(tmp_path, rewards):
    write_run(tmp_path, rewards)
    grouped = curves.lines(load_runs(tmp_path).runs)
    (name,) = grouped
    found = curves.points(name, grouped[name], "reward", 1)
    low, high = curves.draw(grouped, found, 1).axes[0].get_xlim()
    assert -0.1 < low < 0
    assert 1 < high < 1.1


def test_nothing_to_draw_is_said(tmp_path, capsys):
    assert curves.main(["--logs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    write_run(tmp_path / "a", [math.nan])
    assert curves.main(["--logs", str(tmp_path), "--out", str(tmp_path / "out")]) in (0, 2)
    assert capsys.readouterr().err.startswith("error: ")


def test_both_folders_must_be_named(tmp_path, capsys):
    for given, lacks in ((["--logs", "a"], "--out"), (["--out", "a"], "--logs"), ([], "--logs, --out")):
        assert curves.main(given) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: the following arguments are required: {lacks};")


def test_the_command_says_what_it_wrote(tmp_path):
    write_run(tmp_path / "logs", [1.0, 2.0])
    line = [sys.executable, "-m", "puzzle.plotting.curves", "--logs", str(tmp_path / "logs"), "--out"]
    root = Path(curves.__file__).parents[1]
    done = subprocess.run(
        [*line, str(tmp_path / "out")], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"curves.pdf .png .csv in {tmp_path / 'out'}\n")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".pdf", ".png", ".csv"}


def test_iterations_without_metrics_leave_the_others_drawn(tmp_path):
    write_run(tmp_path / "none", [math.nan, 2.0, 3.0])
    (run,) = load_runs(tmp_path / "none").runs
    first, *rest = run.iterations
    partly = replace(run, records=(replace(first, metrics={}), *rest))
    curves.write([partly], tmp_path)
    assert [row["iteration"] for row in read(tmp_path) if row["metric"] == "reward"] == ["1.0", "2.0"]
    assert curves.block_of([]) == 1
    with pytest.raises(UserError, match="no metrics to draw"):
        curves.write([replace(run, records=(replace(first, metrics={}),))], tmp_path)


def test_lines_of_other_configurations_are_told_apart(tmp_path):
    write_run(tmp_path / "a", [1.0])
    write_run(tmp_path / "b", [1.0, 2.0], seed=1)
    grouped = curves.lines(load_runs(tmp_path).runs)
    assert list(grouped) == ["tiny/tiny puzzle local", "tiny/tiny puzzle local #2"]
    assert {pair(run) for group in grouped.values() for run in group} == {"tiny/tiny"}
