"""What a host must have before a run starts any process: packages, files, a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puzzle.config.base import RunConfig
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import config_of
from puzzle.errors import UserError
from puzzle.rlhf import requirements
from puzzle.rlhf.requirements import check_files, check_packages
from puzzle.rlhf.rewards.weighted import probe
from tests.rlhf.one_process import INIT, configured

FUNCTION = """
def known(responses, answer): return [0.0] * len(responses)
def unknown(responses, anwser): return [0.0] * len(responses)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(json.dumps({"prompt": "a", "response": "b", "answer": 1}) + "\n")
    Path("bad.jsonl").write_text("{\n")
    Path("mine.py").write_text(FUNCTION)
    return tmp_path


def of_prompts(prompts: str, eval_prompts: str | None, **reward: Any) -> TrainConfig:
    sections: dict[str, Any] = {"data": {"prompts": prompts, "eval_prompts": eval_prompts}}
    config = configured(**sections)
    return config.model_copy(update={"reward": type(config.reward).model_validate(reward or {"init": INIT})})


def of_examples(examples: str, eval_examples: str | None) -> RunConfig:
    data = {"examples": examples, "eval_examples": eval_examples, "tokenizer": "bytes"}
    return config_of({"task": "sft", "actor": {"init": INIT}, "data": data})


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("make", [of_prompts, of_examples])
@pytest.mark.parametrize(
    ("files", "odd"),
    [
        (("good.jsonl", None), None),
        (("good.jsonl", "good.jsonl"), None),
        (("bad.jsonl", None), "bad.jsonl"),
        (("absent.jsonl", "good.jsonl"), "absent.jsonl"),
        (("good.jsonl", "bad.jsonl"), "bad.jsonl"),
    ],
)
def test_every_file_of_a_run_is_read(make: Any, files: tuple[str, str | None], odd: str | None) -> None:
    if odd is None:
        check_files(make(*files))
        return
    with pytest.raises(UserError, match=f"^{odd}"):
        check_files(make(*files))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("place", ["prompts", "eval_prompts"])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_reward_asks_for_what_files_have(
    monkeypatch: pytest.MonkeyPatch, place: str, workers: int | None
) -> None:
    """Its process ends, whatever is found."""
    closed: list[bool] = []

    def probed(config: Any) -> Any:
        rewards = probe(config)
        assert rewards is not None
        close = rewards.close
        monkeypatch.setattr(rewards, "close", lambda: closed.append(True) or close())
        return rewards

    monkeypatch.setattr(requirements, "probe", probed)
    check_files(of_prompts("good.jsonl", "good.jsonl", function="mine.py:known", workers=workers))
    Path("lacks.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    files = ("lacks.jsonl", "good.jsonl") if place == "prompts" else ("good.jsonl", "lacks.jsonl")
    for names, function in ((files, "known"), (("good.jsonl",) * 2, "unknown")):
        with pytest.raises(UserError, match="answer" if function == "known" else "anwser"):
            check_files(of_prompts(*names, function=f"mine.py:{function}", workers=workers))
    assert closed == [True] * 3


@pytest.mark.parametrize("lacks", ["accelerate", "tensorboard", "apex", None])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_what_is_asked_for_is_installed(
    monkeypatch: pytest.MonkeyPatch, lacks: str | None, role: str
) -> None:
    asked: list[str] = []

    def find_spec(name: str) -> object | None:
        asked.append(name)
        return None if name == lacks else object()

    monkeypatch.setattr(requirements, "find_spec", find_spec)
    section: Any = {role: {"init": INIT, "optimizer": {"backend": "apex"}}}
    config = configured(log={"trackers": ["tensorboard"]}, **section)
    if lacks is None:
        check_packages(config)
        assert asked == ["accelerate", "tensorboard", "apex"]
    else:
        words = (
            f"{role}.optimizer.backend: apex" if lacks == "apex" else f"log.trackers: tensorboard: .*{lacks}"
        )
        with pytest.raises(UserError, match=words):
            check_packages(config)
    asked.clear()
    check_packages(configured())
    assert asked == []
