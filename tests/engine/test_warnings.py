"""What ranks warn of is told once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puzzle.config.memory_report import unless_skipped
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError


@pytest.mark.parametrize(
    ("refused", "told"),
    [("", ""), ("0", "0"), ("2", "2"), ("12", "1"), ("0123", "0")],
)
def test_ranks_that_skip_a_check_warn_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str, told: str
) -> None:
    """In the words of the first that refuses; every rank takes part, whether it refuses or not."""
    worlds = [World(rank, 4, torch.device("cpu")) for rank in range(4)]
    given: list[Any] = []

    def check(world: World) -> None:
        with unless_skipped(True, "--skip", world.warn):
            if str(world.rank) in refused:
                raise UserError(f"rank {world.rank} has {world.rank} bytes")

    for world in reversed(worlds):  # rank 0 last, when it knows what the others said
        monkeypatch.setattr(world, "gather", lambda own: given.insert(0, own) or given)
        check(world)
    assert [line is not None for line in given] == [str(rank) in refused for rank in range(4)]
    said = capsys.readouterr().err
    assert said == (f"warning: rank {told} has {told} bytes; begun anyway\n" if told else "")
