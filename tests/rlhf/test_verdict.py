"""After the watchdog's verdict a run's traces and profiles are neither begun nor ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from puzzle.config.load import build
from puzzle.config.resolve import resolve
from puzzle.engine.runtime.world import World
from puzzle.plan.simulate.timeline import Timeline
from puzzle.rlhf.provenance import run_header
from puzzle.rlhf.recorder import Recorder
from tests.launch.running import config


def trace(recorder: Recorder) -> None:
    recorder.trace(0, Timeline((), "measured"))


def profiled(recorder: Recorder) -> None:
    with recorder.profiled(0):
        torch.ones(2).sum()


def verdict(world: World) -> None:
    """What a watchdog does first: its thread takes the gate, and lives until the process ends."""
    taken = threading.Event()

    def judge() -> None:
        world.progress.writing.acquire()
        taken.set()
        threading.Event().wait()

    threading.Thread(target=judge, daemon=True).start()
    assert taken.wait(60)


@pytest.mark.parametrize("when", ["never", "before", "meanwhile"])
@pytest.mark.parametrize("act", [trace, profiled])
def test_a_verdict_ends_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Recorder], None], when: str
) -> None:
    run = build(config(layout={"tp": 1, "pp": 1, "dp": 1}, log={"profile": [0], "plots": False}), str)
    world = World(0, 1, torch.device("cpu"))
    recorder = Recorder(tmp_path / "out", run, world, run_header(resolve(run), {}))
    before = set(tmp_path.rglob("*"))
    for place, name in ((Timeline, "to_perfetto"), (profile, "export_chrome_trace")):
        own = getattr(place, name)

        def late(*given: Any, own: Callable[..., Any] = own) -> Any:
            if when == "meanwhile":
                verdict(world)
            return own(*given)

        monkeypatch.setattr(place, name, late)
    if when == "before":
        verdict(world)
    writes = threading.Thread(target=act, args=(recorder,), daemon=True)
    writes.start()
    writes.join(60 if when == "never" else 3)
    there = set(tmp_path.rglob("*")) - before
    names = [path.name for path in there if path.is_file()]
    if when == "never":
        assert not writes.is_alive()
        assert [name.split(".")[0].removesuffix("-rank-000") for name in names] == ["iteration-0"]
    else:
        assert writes.is_alive()
        assert all(name.startswith(".partial-") for name in names), names
        assert when == "meanwhile" or not there
