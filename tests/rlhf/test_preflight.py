"""What ranks refuse before models are loaded, and the memory that generation is given, with ranks that say
what they are told."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.config import memory_report as footprint
from puzzle.config.resolve import RunPlan, resolve
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf import policy_generator, preflight
from puzzle.rlhf.policy_generator import room_of
from tests.rlhf.one_process import configured, run, trainer_of


@pytest.mark.parametrize(
    ("hashes", "odd"),
    [("aaaa", None), ("a", None), ("ab", 1), ("aab", 2), ("aba", 1), ("abb", 1), ("abca", 1)],
)
def test_the_first_rank_with_another_plan_is_named(hashes: str, odd: int | None) -> None:
    """Beside that of rank 0, whatever the last rank has."""
    world: Any = SimpleNamespace(gather=lambda own: list(hashes) if own == "a" else None)
    plan: Any = SimpleNamespace(hash="a")
    if odd is None:
        preflight.agree(plan, world)
        return
    with pytest.raises(UserError, match=f"^rank {odd} resolved the run to plan {hashes[odd]}, rank 0 to a: "):
        preflight.agree(plan, world)


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_run_that_does_not_fit_is_refused(place: str, fits: bool) -> None:
    """By the device's memory where that is known, else by what the host has free, which says of what."""
    plan, size = resolve(configured()), 1 << 40 if fits else 1 << 10
    free = SimpleNamespace(bytes=size, told="free of all that this host has")
    other = SimpleNamespace(bytes=1, told="not asked for")
    world: Any = SimpleNamespace(
        device_memory=size if place == "device" else None,
        free_memory=lambda: free if place == "host" else other,
        warn=World(0, 1, torch.device("cpu")).warn,
    )
    if fits:
        preflight.check_memory(plan, world)
        return
    with pytest.raises(UserError) as error:
        preflight.check_memory(plan, world)
    assert (free.told in str(error.value)) == (place == "host")
    assert str(error.value).endswith("; --launch.skip_memory_check true begins anyway")


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_run_that_skips_the_check_is_warned(
    place: str, fits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = resolve(configured(launch={"skip_memory_check": True}))
    size = 1 << 40 if fits else 1 << 10
    world: Any = SimpleNamespace(
        device_memory=size if place == "device" else None,
        free_memory=lambda: SimpleNamespace(bytes=size, told="free are"),
        warn=World(0, 1, torch.device("cpu")).warn,
    )
    preflight.check_memory(plan, world)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("warning: rank 0 needs ") == (not fits)


@pytest.mark.parametrize("refuses", [True, False])
def test_every_rank_refuses_what_the_first_one_does(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    """It alone looks at the folder."""
    looked: list[Path] = []

    def refuse(checkpoints: Path) -> None:
        looked.append(checkpoints)
        if refuses:
            raise UserError("models are there")

    monkeypatch.setattr(preflight.folders, "refuse_replacing", refuse)
    told: list[Any] = []

    def share(own: Any) -> Any:
        told.append(own)
        return told[0]

    for rank in (0, 1, 2):
        world: Any = SimpleNamespace(rank=rank, share=share)
        with pytest.raises(UserError, match="models are there") if refuses else nullcontext():
            preflight.refuse_replacing(Path("checkpoints"), world)
    assert looked == [Path("checkpoints")]
    assert told[1:] == [None, None]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_pages_stay_where_every_rank_has_room_for_them(
    monkeypatch: pytest.MonkeyPatch, kept: bool, others: bool
) -> None:
    plan = resolve(configured())
    assert isinstance(plan, RunPlan)
    (rank,) = footprint.estimate(plan, False)
    assert rank.cache is not None
    cache = replace(rank.cache, rows=3, columns=5, pages=11, kept=kept)
    monkeypatch.setattr(footprint, "estimate", lambda *_: [replace(rank, cache=cache)])
    world: Any = SimpleNamespace(
        device=torch.device("cpu"),
        device_memory=None,
        rank=0,
        max=lambda x: torch.maximum(x, torch.tensor(int(not others))),
    )
    room = room_of(plan, world)
    assert (room.rows, room.columns) == (3, 5)
    assert room.pages == (10 if kept and others else 0)


@pytest.mark.parametrize("graphs", [True, False])
def test_generation_runs_as_it_is_configured(monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    seen: list[tuple[bool, Any]] = []
    original = policy_generator.ModelRunner

    def runner(decoder: Any, graphs: bool, *, room: Any) -> Any:
        seen.append((graphs, room))
        return original(decoder, graphs, room=room)

    monkeypatch.setattr(policy_generator, "ModelRunner", runner)
    config = configured(generation={"graphs": graphs, "samples": 2}, iterations=2)
    trainer = trainer_of(config)
    run(trainer)
    assert [one for one, _ in seen] == [graphs]
    assert seen[0][1] == room_of(trainer.plan, trainer.world)
