"""`puzzle bench exact`: which pairs of layouts it compares; and who lets ranks share devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puzzle.bench import exact, iterations
from puzzle.cli import main
from puzzle.engine.runtime import world as worlds
from puzzle.engine.runtime.world import World
from puzzle.rlhf import evaluation

LINE = ["bench", "exact", "--device", "cpu", "--models", "qwen2", "--dtypes", "bf16", "--ways"]
ALL = [(1, 1, 2), (1, 2, 1), (2, 1, 1)]


class Enough(BaseException):
    """What was asked for is known."""


def test_all_pairs_are_compared_or_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds: list[list[Any]] = []

    def run(cases: list[dict[str, Any]], world: int, **_: object) -> Any:
        worlds.append([(case.get("layout"), case["generation"].get("layout")) for case in cases])
        if world > 1:
            raise Enough
        return [[exact.Found(bits=["a", "b"])] * len(cases)]

    def found(*words: str) -> list[Any]:
        with pytest.raises(Enough):
            main([*LINE, *words])
        return worlds[-1]

    def sides(*pairs: Any) -> list[Any]:
        return [tuple(dict(zip(("tp", "pp", "dp"), one, strict=True)) for one in pair) for pair in pairs]

    monkeypatch.setattr(exact, "_run", run)
    assert found("--world", "2") == sides(*((a, b) for a in ALL for b in ALL))
    two = ["--pairs", "1,1,2:2,1,1", "1,2,1:1,2,1"]
    assert found("--world", "2", *two) == sides(((1, 1, 2), (2, 1, 1)), ((1, 2, 1), (1, 2, 1)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "4", "--pairs", "2,2,1:1,1,2"], "--pairs: 1,1,2 has 2 processes; --world is 4"),
        (["--world", "4", "--pairs", "2,2,1"], "2,2,1: write two layouts"),
        (["--world", "3"], "--world 3: no layout"),
        (["--world", "8", "--pairs", "8,1,1:1,1,8"], "--pairs: 8,1,1: tp is 1, 2 or 4"),
        (["--world", "8", "--pairs", "1,8,1:1,1,8"], "--pairs: 1,8,1: tp is 1, 2 or 4 in the runs"),
        (["--world", "16", "--pairs", "1,1,16:4,4,1"], "and dp divides 8"),
        (["--models"], "--models: nothing to compare and nothing to time"),
        (["--price", "350m", "--iterations", "1"], "--iterations 1: the first is not timed; give 2 or more"),
        (["--price", "350m", "--numerics", "fast"], "--numerics: the bench compares"),
        (["--price", "350m", "--numerics_parts", "2"], "--numerics_parts: the bench compares"),
        (["--price", "350m", "--launch.share_device", "true"], "--launch.share_device: ranks that share"),
        (["--share-device", "--price", "350m"], "--price: ranks that share a GPU take turns"),
    ],
)
def test_refused_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE, *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def asked(monkeypatch: pytest.MonkeyPatch, command: Callable[[], object]) -> bool:
    """Whether the first process that `command` starts was asked to share its device."""
    told: list[bool] = []

    def start(*_: object, share_device: bool = False, **__: object) -> World:
        told.append(share_device)
        raise Enough

    monkeypatch.setattr(World, "start", start)
    with pytest.raises(Enough):
        command()
    return told[0]


TRAIN = ["train", "--device", "cpu", "--data.random_tokens", "4", "--out", "OUT"]
TRAIN += ["--actor.init.preset", "350m", "--reward.init.preset", "350m"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (LINE, ["--share-device"]),
        (["bench", "check", "--device", "cpu"], ["--share-device"]),
        (TRAIN, ["--launch.share_device", "true"]),
    ],
    ids=["exact", "check", "train"],
)
def test_only_who_asks_for_it_shares_a_device(
    words: list[str], option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, more in enumerate(([], option)):
        line = [word.replace("OUT", str(tmp_path / f"run-{number}")) for word in (*words, *more)]
        assert asked(monkeypatch, lambda line=line: main(line)) == bool(more)


def test_evaluations_share_a_device_if_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"actor": {"model": "lm"}, "data": {"prompts": "prompts.jsonl"}}
    values["reward"] = {"function": "puzzle.rlhf.rewards:exact_answer", "workers": 0}
    for shared in (False, True):
        values["launch"] = {"share_device": shared}
        assert asked(monkeypatch, lambda: evaluation.process(values, None)) == shared


def test_whole_runs_share_beside_a_truth_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, Any]] = []

    def run(values: dict[str, Any]) -> None:
        runs.append(values)
        if len(runs) == 2:
            raise Enough

    monkeypatch.setattr(iterations, "save_models", lambda _: {})
    monkeypatch.setattr(iterations, "_run", run)
    with pytest.raises(Enough):
        main(["bench", "iterations", "--world", "2", "--share-device"])
    assert [run["launch"]["share_device"] for run in runs] == [False, True]


@pytest.mark.parametrize(
    "line", [LINE, ["bench", "iterations", "--device", "cpu"]], ids=["exact", "iterations"]
)
def test_what_a_refusal_of_memory_names_is_an_option(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(_: World, told: str | None) -> None:
        assert told is not None
        raise Enough

    monkeypatch.setattr(worlds, "host_free", lambda: 1 << 10)
    monkeypatch.setattr(World, "warn", warn)
    assert main(line) == 2
    told = capsys.readouterr().err
    option = re.search(r"(--[a-z_.]+) (true) begins anyway$", told.strip())
    assert option is not None, told
    with pytest.raises(Enough):
        main([*line, *option.groups()])


@pytest.mark.long
def test_layouts_agree_through_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["--pairs", "2,1,1:1,2,1", "1,1,2:2,1,1"]
    assert main([*LINE, "--world", "2", "--share-device", *pairs]) == 0
    assert capsys.readouterr().out.count("the same bits") == 2
