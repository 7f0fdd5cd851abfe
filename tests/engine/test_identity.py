"""Which process of a run this is, by every kind of environment that a launcher may or may not have set."""

from __future__ import annotations

import pytest
import torch

from puzzle.engine.runtime.identity import Identity, launched
from puzzle.engine.runtime.watchdog import Watch
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError

MET = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def ranks(rank: object, world: object, **more: object) -> dict[str, str]:
    return {**MET, "RANK": str(rank), "WORLD_SIZE": str(world), **{k: str(v) for k, v in more.items()}}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "", "WORLD_SIZE": " "}, None),
        ({"LOCAL_RANK": "3", "MASTER_PORT": "no"}, None),  # left behind by others
        ({"RANK": "0", "WORLD_SIZE": "1"}, Identity(0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Identity()),
        (ranks(0, 2), Identity(0, 2, 0, 2)),
        (ranks(1, 2), Identity(1, 2, 1, 2)),
        (ranks(5, 8, LOCAL_WORLD_SIZE=4), Identity(5, 8, 1, 4)),
        (ranks(5, 8, LOCAL_WORLD_SIZE=8), Identity(5, 8, 5, 8)),
        (ranks(5, 8, LOCAL_RANK=2, LOCAL_WORLD_SIZE=4), Identity(5, 8, 2, 4)),
        (ranks(5, 8, LOCAL_RANK=7), Identity(5, 8, 7, 8)),
        (ranks(1, 2, MASTER_PORT=1), Identity(1, 2, 1, 2)),
        (ranks(1, 2, MASTER_PORT=65535), Identity(1, 2, 1, 2)),
        (ranks(" 1 ", 2), Identity(1, 2, 1, 2)),
        (ranks(1, 999999999), Identity(1, 999999999, 1, 999999999)),
    ],
)
def test_a_place_is_what_the_launcher_says(environment: dict[str, str], place: Identity | None) -> None:
    assert launched(environment) == place


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        (ranks(2, 2), "RANK=2 and WORLD_SIZE=2 do not fit each other"),
        (ranks(0, 0), "RANK=0 and WORLD_SIZE=0 do not fit each other"),
        (ranks(-1, 2), "RANK=-1: expected a whole number"),
        (ranks("1.0", 2), r"RANK=1\.0: expected a whole number"),
        (ranks("\u0661", 2), "expected a whole number"),
        (ranks(1, 1000000000), "WORLD_SIZE=1000000000: expected a whole number"),
        (ranks("9" * 41, 2), f"RANK={'9' * 37}[.][.][.]: expected"),
        (ranks("9" * 40, 2), f"RANK={'9' * 40}: expected"),
        (ranks(0, 2, MASTER_ADDR=" "), "MASTER_ADDR is not"),
        (ranks(0, 2, MASTER_PORT=""), "MASTER_PORT is not"),
        (ranks(0, 2, MASTER_PORT=0), "MASTER_PORT=0: expected a port"),
        (ranks(0, 2, MASTER_PORT=65536), "MASTER_PORT=65536: expected a port"),
        (ranks(0, 2, MASTER_PORT="http"), "MASTER_PORT=http: expected a whole number"),
        (ranks(0, 2, LOCAL_RANK=2), "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2 and WORLD_SIZE=2 do not fit"),
        (ranks(0, 2, LOCAL_WORLD_SIZE=3), "LOCAL_WORLD_SIZE=3 and WORLD_SIZE=2 do not fit"),
        (ranks(0, 2, LOCAL_WORLD_SIZE=0), "LOCAL_RANK=0, LOCAL_WORLD_SIZE=0 and WORLD_SIZE=2 do not fit"),
    ],
)
def test_what_no_launcher_would_set_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        launched(environment)
    assert "\n" not in str(caught.value)


def test_a_process_alone_has_no_groups_no_watchdog_and_sums_itself(monkeypatch, tmp_path) -> None:
    for name in ("RANK", "WORLD_SIZE", *MET):
        monkeypatch.delenv(name, raising=False)
    with World.start("cpu", watch=Watch(1.0, lambda line, first: None, tmp_path)) as world:
        assert (world.rank, world.size, world.per_node, world.device) == (0, 1, 1, torch.device("cpu"))
        assert world.watchdog is None
        assert world.groups([(0,)], "alone") is None
        ones = torch.ones(3)
        assert world.sum(ones) is ones
        assert world.max(ones) is ones
        assert ones.tolist() == [1, 1, 1]
        assert world.share({"a": 1}) == {"a": 1}
        assert world.gather("x") == ["x"]
        assert not world.moved
    assert not list(tmp_path.iterdir())
