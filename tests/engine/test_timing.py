"""Seconds of stages over ranks whose clocks differ, shares of rows, boxes in files: no process group."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.engine.checkpoint.boxfiles import Logical, Reader, checksum, write_boxes
from puzzle.engine.checkpoint.manifest import Entry
from puzzle.engine.pipeline.model import share
from puzzle.engine.runtime import stage_timer as timing
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.tracing import stage_records
from puzzle.errors import UserError
from puzzle.plan.pipeline.actions import Action, Op
from puzzle.plan.pipeline.schedules import PipelineModel, one_f_one_b
from puzzle.plan.shards import Box


class Ranks:
    """A world whose other rank's marks are given."""

    device = torch.device("cpu")

    def __init__(self, others: list[float]) -> None:
        self.others, self.waits = others, 0

    def synchronize(self) -> None:
        self.waits += 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        assert values.dtype == torch.float64
        return torch.maximum(values, torch.tensor(self.others, dtype=torch.float64))


def test_stages_end_with_the_slowest_rank_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of this rank: 1, 4, 5, 9 s after the start; of the other: 2, 3, 6, 8. So 2, 4, 6, 9."""
    times = iter([100.0, 101.0, 104.0, 105.0, 109.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    world = Ranks([2.0, 3.0, 6.0, 8.0])
    clock = StageClock(cast(Any, world))
    before = world.waits
    for name in ("generation", "inference", "generation", "training"):
        clock.end(name)
    assert world.waits == before + 4, "the device is waited for at each end"
    seconds, total = clock.seconds(("generation", "inference", "training", "switch"))
    assert seconds == {"generation": 2.0 + 2.0, "inference": 2.0, "training": 3.0, "switch": 0.0}
    assert total == 9.0
    spans = [(s.row, s.name, s.start, s.end) for s in clock.spans(7)]
    assert spans == [
        (7, "generation", 0.0, 1.0),
        (7, "inference", 1.0, 4.0),
        (7, "generation", 4.0, 5.0),
        (7, "training", 5.0, 9.0),
    ]
    assert clock.peaks == {}


def test_a_stage_that_comes_again_keeps_its_highest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first number is of what came before all stages."""
    peaks = iter([99, 5, 7, 3, 8])
    monkeypatch.setattr(timing, "take_peak", lambda device: next(peaks))
    clock = StageClock(cast(Any, Ranks([])))
    for name in ("generation", "training", "generation", "training"):
        clock.end(name)
    assert clock.peaks == {"generation": 5, "training": 8}


class Marked:
    """A clock whose runs are given as (stage, schedule, [(action, start, end)])."""

    def __init__(self, runs: list) -> None:
        self._runs = runs

    def runs(self) -> list:
        return self._runs


def test_the_bubble_share_is_of_all_runs_and_ranks() -> None:
    """Two runs of one stage on two ranks, by hand: waits are idle, the start of a sum of norms is not."""
    schedule = one_f_one_b((PipelineModel("actor", 1),), 2)
    forward, backward = Action(Op.FORWARD, "actor", 0), Action(Op.BACKWARD, "actor", 0)
    norm, wait = Action(Op.NORM, "actor"), Action(Op.WAIT_NORM, "actor")
    mine = [
        ("training", schedule, [(forward, 10.0, 12.0), (wait, 12.0, 13.0), (backward, 13.0, 16.0)]),  # busy 5
        ("other", None, [(forward, 0.0, 1.0)]),
        ("training", schedule, [(forward, 20.0, 21.0), (norm, 21.0, 21.5), (wait, 21.5, 24.0)]),  # busy 1.5
        ("empty", schedule, []),
    ]
    theirs = {"training": [(9.0, 15.0, 1.0), (22.0, 26.0, 2.5)]}
    world = SimpleNamespace(gather=lambda own: [own, theirs])
    (record,) = stage_records(cast(Any, world), cast(Any, Marked(mine)))
    # From 9 to 16 and from 20 to 26: 13 s, in which a rank is busy for 3 and for 2 on average.
    assert record["bubble_share"] == pytest.approx(1 - 5 / 13)
    assert (record["name"], record["schedule"], record["hash"]) == ("training", schedule.name, schedule.hash)
    assert record["actions"] == schedule.counts()
    assert record["flushes"] == schedule.flushes == 1
    assert "microbatches" not in record


def test_shares_are_those_of_array_split() -> None:
    for count in range(12):
        for parts in range(1, 7):
            wanted = [part.tolist() for part in np.array_split(np.arange(count), parts)]
            assert [list(share(count, parts, i)) for i in range(parts)] == wanted


WHOLE = torch.arange(60.0).view(10, 6) + 1
CUTS = [Box(((0, 4), (0, 6))), Box(((4, 10), (0, 2))), Box(((4, 10), (2, 6)))]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[Entry]]:
    """The tensor in three boxes, of which the first lies in a file of its own."""
    entries = []
    for name, boxes in (("a.safetensors", CUTS[:1]), ("b.safetensors", CUTS[1:])):
        parts = [(f"part {box.intervals}", WHOLE[box.slices]) for box in boxes]
        ticks: list[int] = []
        saved = write_boxes(tmp_path / name, parts, lambda ticks=ticks: ticks.append(1))
        data = (tmp_path / name).read_bytes()
        assert (saved.bytes, saved.crc) == (len(data), zlib.crc32(data)) == checksum(tmp_path / name)
        assert len(ticks) == len(parts)
        found = load_file(tmp_path / name)  # as the library reads it
        assert all(torch.equal(found[key], values) for key, values in parts)
        entries += [
            Entry("actor", "w", "weight", box, name, key) for box, (key, _) in zip(boxes, parts, strict=True)
        ]
    return tmp_path, entries


def test_any_box_is_read_out_of_the_boxes_that_were_written(files: tuple[Path, list[Entry]]) -> None:
    folder, entries = files
    with Reader(folder, entries) as reader:
        for a in range(10):
            for b in range(a + 1, 11, 3):
                for c in range(6):
                    for d in range(c + 1, 7, 2):
                        box = Box(((a, b), (c, d)))
                        assert torch.equal(reader.read("actor", "w", "weight", box), WHOLE[a:b, c:d])
                        logical = Logical(reader, "actor", "w")[slice(a, b), slice(c, d)]
                        assert torch.equal(logical, WHOLE[a:b, c:d])


@pytest.mark.parametrize("what", ["infinite", "nan", "shape", "dtype", "key"])
def test_what_a_file_should_not_hold_is_named(files: tuple[Path, list[Entry]], what: str) -> None:
    folder, entries = files
    tensors = load_file(folder / "b.safetensors")
    key = next(iter(tensors))
    if what in ("infinite", "nan"):
        tensors[key][0, 0] = float("inf" if what == "infinite" else "nan")
    elif what == "shape":
        tensors[key] = tensors[key][:, :1].contiguous()
    elif what == "dtype":
        tensors[key] = tensors[key].double()
    else:
        tensors["another"] = tensors.pop(key)
    save_file(tensors, folder / "b.safetensors")
    with Reader(folder, entries) as reader:
        whole = Box(((0, 10), (0, 6)))
        with pytest.raises(UserError, match="actor, weight of w: ") as error:
            reader.read("actor", "w", "weight", whole)
        assert "\n" not in str(error.value)
        assert torch.equal(reader.read("actor", "w", "weight", CUTS[0]), WHOLE[:4])
    assert str(error.value).startswith(str(folder))
