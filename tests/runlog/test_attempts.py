"""What counts of a run that was resumed: of each iteration the last attempt, written out once more here."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from puzzle.runlog import Run
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.record import Line, Record, encode
from puzzle.runlog.records import End, Iteration, Resume, Switch
from puzzle.runlog.run import printed_series
from tests.runlog import texts


def log(path: Path, events: Sequence[Record]) -> Run:
    """The run of a log with these records behind its header."""
    lines = [encode(Line(seq, record, 1.0)) for seq, record in enumerate([texts.header(), *events])]
    path.write_text("".join(f"{line}\n" for line in lines))
    run = read_jsonl(path)
    assert isinstance(run, Run)
    return run


def iteration(index: int, seconds: float) -> Iteration:
    return Iteration(index, *texts.stages(seconds, 0.25, 0.5), {"kl": seconds})


def resume(index: int, **more: Any) -> Resume:
    return Resume(index, "state", **more)


@pytest.mark.parametrize("seed", range(20))
def test_the_last_attempt_of_each_iteration_counts(tmp_path: Path, seed: int) -> None:
    """Random runs that go back some iterations at each resume, with 0 to 2 switches an iteration."""
    chance = random.Random(seed)
    events: list[Record] = []
    seconds: dict[int, float] = {}
    switches: dict[int, list[float]] = {}
    at = 0
    for attempt in range(4):
        if attempt:
            at = chance.randint(0, at)
            events.append(resume(at))
        for _ in range(chance.randint(1, 5)):
            spent = [round(chance.uniform(0.1, 1.0), 3) for _ in range(chance.randint(0, 2))]
            seconds[at] = round(chance.uniform(1.0, 9.0), 3)
            events.append(iteration(at, seconds[at]))
            events += [Switch(at, one) for one in spent]
            if spent:  # of an attempt that wrote none the one before stays
                switches[at] = spent
            at += 1
    run = log(tmp_path / "run.jsonl", events)
    assert [(one.iteration, one.stage_seconds["generation"]) for one in run.iterations] == sorted(
        seconds.items()
    )
    assert [one.metrics["kl"] for one in run.iterations] == [seconds[index] for index in sorted(seconds)]
    expected = [(index, one) for index in sorted(switches) for one in switches[index]]
    assert [(one.iteration, one.seconds) for one in run.switches] == expected
    assert not any("again without a resume" in report.what for report in run.reports)


def test_an_iteration_twice_in_one_attempt_is_said(tmp_path: Path) -> None:
    once = [iteration(0, 1.0), iteration(1, 2.0)]
    again = log(tmp_path / "run.jsonl", [*once, resume(1), iteration(1, 3.0), iteration(1, 4.0)])
    assert [report.what for report in again.reports] == [
        "iteration 1 again without a resume; this one counts"
    ]
    assert again.iterations[1].stage_seconds["generation"] == 4.0


@pytest.mark.parametrize(
    ("events", "ended"),
    [
        ([iteration(0, 1.0)], False),
        ([iteration(0, 1.0), End("failed")], True),
        ([iteration(0, 1.0), End("failed"), resume(1), iteration(1, 1.0)], False),
        (
            [End("failed"), resume(0), iteration(0, 1.0), End("completed")],
            True,
        ),
    ],
)
def test_a_resumed_run_has_not_ended(tmp_path: Path, events: list[Record], ended: bool) -> None:
    assert log(tmp_path / "run.jsonl", events).ended is ended


def test_what_a_resume_changed_is_said(tmp_path: Path) -> None:
    changed = {"seed": [0, 1], "batch": [8, 4]}
    run = log(tmp_path / "run.jsonl", [iteration(0, 1.0), resume(1, changed=changed), iteration(1, 1.0)])
    assert [(one.line, one.what) for one in run.reports] == [
        (3, "resumed at iteration 1 with other batch, seed")
    ]
    assert not log(tmp_path / "same.jsonl", [iteration(0, 1.0), resume(1), iteration(1, 1.0)]).reports


@pytest.mark.parametrize("switched", [(0.5, 0.25, 0.75), (0.0, 0.25, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("variant", ["dschat", "opt"])
def test_series_of_a_log_that_printed_none(tmp_path: Path, variant: str, switched: tuple[float, ...]) -> None:
    """The switch is inside the printed generation; DeepSpeed-Chat's experience is all before training."""
    events = []
    for index, seconds in enumerate(switched):
        stages, e2e = texts.stages(4.0 + index, 2.0, 8.0 * (index + 1), seconds, other=0.125)
        events.append(Iteration(index, stages, e2e, {}))
    run = log(tmp_path / "run.jsonl", events)
    found = dict(printed_series(variant, run.iterations))
    generation = tuple(4.0 + index + seconds for index, seconds in enumerate(switched))
    expected = {
        "e2e": tuple(whole + 2.0 + 8.0 * (index + 1) + 0.125 for index, whole in enumerate(generation)),
        "generation": generation,
        "training": (8.0, 16.0, 24.0),
    }
    if variant == "dschat":
        expected["experience"] = tuple(whole + 2.0 for whole in generation)
    else:
        expected["inference"] = (2.0, 2.0, 2.0)
    if any(switched):
        expected["gather" if variant == "dschat" else "reshard"] = switched
    assert found == expected
    assert printed_series(variant, ()) == {}
