"""Former names of keys are read as their present ones."""

from pathlib import Path

import pytest

from puzzle.config.load import keys, load_config
from puzzle.config.renamed import RENAMED, modernised, present
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError

BASE = """\
actor: {init: {preset: 350m}}
reward: {init: {preset: 350m}}
data: {random_tokens: 8}
layout: {dp: 2}
generation: {layout: {tp: 2, dp: 1}}
"""


def test_present_names_exist_and_former_ones_do_not() -> None:
    known = {key for key, _ in keys()}
    assert all(renamed.new in known and renamed.old not in known for renamed in RENAMED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ppo: {clip: 0.3, kl: {coef: 0.5}}", "algorithm: {clip: 0.3, kl: {coef: 0.5}}"),
        ("ppo: {clip: 0.3}\nalgorithm: {gamma: 0.9}", "algorithm: {clip: 0.3, gamma: 0.9}"),
        ("switch: {fill: shards}", "switch: {source: zero_shards}"),
        ("switch: {fill: gathered, beside: prefill}", "switch: {source: gathered, overlap: prefill}"),
    ],
)
def test_files_of_before_say_the_same(tmp_path: Path, capsys, old: str, new: str) -> None:
    configs = []
    for text in (old, new):
        (tmp_path / "run.yaml").write_text(BASE + text)
        configs.append(load_config(tmp_path / "run.yaml"))
    assert configs[0] == configs[1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == sum(old.count(f"{word}:") for word in ("ppo", "fill", "beside"))
    assert all(line.startswith("note: ") and " is now " in line for line in said)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--ppo.kl.coef", "0.5"], ["--algorithm.kl.coef", "0.5"]),
        (["--ppo.kl.coef=0.5"], ["--algorithm.kl.coef=0.5"]),
        (["--switch.fill", "shards"], ["--switch.source", "zero_shards"]),
        (["--switch.fill=shards"], ["--switch.source=zero_shards"]),
    ],
)
def test_options_of_before_say_the_same(tmp_path: Path, old: list[str], new: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    assert load_config(tmp_path / "run.yaml", old) == load_config(tmp_path / "run.yaml", new)


def test_logs_of_before_are_read() -> None:
    (now,) = (TrainConfig.model_validate({**GIVEN, "algorithm": {"clip": 0.3}}),)
    logged = now.resolved()
    logged["ppo"] = logged.pop("algorithm")
    logged["ppo"].pop("name")
    assert TrainConfig.model_validate(logged) == now


GIVEN = {
    "actor": {"init": {"preset": "350m"}},
    "reward": {"init": {"preset": "350m"}},
    "data": {"random_tokens": 8},
}


def test_one_key_under_both_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASE + "ppo: {clip: 0.3}\nalgorithm: {clip: 0.2}")
    with pytest.raises(UserError, match=r"run.yaml:6: ppo: .*algorithm"):
        load_config(tmp_path / "run.yaml")


def test_a_mistake_is_named_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASE + "ppo:\n  clip: -1")
    with pytest.raises(UserError, match=r"run.yaml:7: algorithm.clip: expected more than 0"):
        load_config(tmp_path / "run.yaml")


def test_what_was_given_stays_as_it_was() -> None:
    data = {"switch": {"fill": "shards"}, "ppo": {"clip": 0.3}}
    modernised(data)
    assert data == {"switch": {"fill": "shards"}, "ppo": {"clip": 0.3}}
    assert present(("ppo", "kl", "coef")) == ("algorithm", "kl", "coef")
    assert present(("seed",)) == ("seed",)
