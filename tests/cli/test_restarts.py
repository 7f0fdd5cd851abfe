"""How often a run that dies is started anew (`launch.max_restarts`); real deaths are in test_dying.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puzzle.cli import train
from puzzle.config.load import build
from puzzle.launch import local
from tests.launch.running import config

GIVEN_UP = "; given up: 2 restarts brought no new checkpoint"


@pytest.mark.parametrize(
    ("newest", "restarts", "starts", "given_up"),
    [
        ((0, 0, 0, 0, 0), 9, 3, True),
        ((4, 4, 4, 4, 4), 9, 3, True),
        ((1, 1, 2, 2, 3, 4, 4, 4, 4), 9, 8, True),
        ((0, 0, 0), 2, 3, False),
        ((1, 2, 3, 4), 3, 4, False),
    ],
)
def test_restarts_end_where_none_helps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    newest: tuple[int, ...],
    restarts: int,
    starts: int,
    given_up: bool,
) -> None:
    """`newest`: the checkpoint that is there when the run dies, each time it is started; what a process left
    half done is gone when the next one starts."""
    out, numbers = tmp_path / "out", iter(newest)
    scratch = out / "checkpoints/.tokenizer-a1b2.partial"

    def dies(*_: Any, **__: Any) -> None:
        assert not scratch.exists()
        scratch.mkdir(parents=True)
        (out / f"checkpoints/state-{next(numbers)}").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints/state-99.partial").mkdir(exist_ok=True)
        raise local.WorkerError("rank 1 on here: a bug", 3)

    monkeypatch.setattr(local, "run", dies)
    run = build(config(launch={"max_restarts": restarts}), str)
    assert train.start(run, out) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == starts == len(newest) - len(list(numbers))
    assert [line.endswith(GIVEN_UP) for line in lines] == [False] * (starts - 1) + [given_up]
