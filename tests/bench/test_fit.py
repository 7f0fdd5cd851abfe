"""A bench whose models do not fit says so in a line, before it makes anything."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.bench import device, exact, fit, harness
from puzzle.bench.generate import GenerateBench
from puzzle.bench.switch import SwitchBench
from puzzle.bench.train import TrainBench
from puzzle.cli import main
from puzzle.cli.bench import BENCHES
from puzzle.config import memory_report as footprint
from puzzle.engine.runtime import world as worlds
from puzzle.engine.runtime.free_memory import FreeMemory, host_free
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.plan.memory import RankMemory
from puzzle.spec.published import published
from tests.bench.metered import Meter

GIB = 1 << 30
LARGE = {
    "memory": (["--device", "cpu", "--out", "OUT/m"], "choose a smaller actor"),
    "exact": (["--device", "cpu", "--models", "llama", "--price", "7b"], "algorithm.microbatch"),
    "overlap": (["--device", "cpu", "--pairs", "1,1,1:1,1,1"], "--layers"),
    "train": (["--device", "cpu"], "--layers"),
    "fuse": (["--device", "cpu", "--layout", "1,1,1"], "--actor"),
    "generate": (["--device", "cpu"], "--sequences"),
    "tails": (["--device", "cpu", "--sequences", "1"], "--layers"),
    "calibrate": (["--device", "cpu", "--out", "OUT/c.json"], "--tokens"),
    "checkpoint": (["--device", "cpu", "--model", "7b", "--folder", "OUT/f"], "--model"),
    "transformers": (["--device", "cpu", "OUT/model"], "--dtype"),
}
TINY: dict[str, Any] = {"model": "350m", "layers": 1, "dtype": "fp32", "device": "cpu"}
SHORT: dict[str, Any] = {"rows": 2, "length": 64, "microbatches": 2, "modes": ("eager",), "repeats": 1}
SMALL = {"check", "iterations", "numerics", "sums"}
"""They make no model but their own, of a few MB, or none."""


def test_every_bench_is_looked_at() -> None:
    assert LARGE.keys() | SMALL | {"switch"} == BENCHES.keys()


@pytest.mark.parametrize("name", LARGE)
def test_what_does_not_fit_is_refused_in_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 GiB are free, which no 7B fits into."""
    monkeypatch.setattr(worlds, "host_free", lambda: 4 * GIB)
    monkeypatch.setattr(harness, "random_model", lambda *_: pytest.fail("a model is made"))
    words, advice = LARGE[name]
    if name == "transformers":
        _folder(tmp_path / "model")
        monkeypatch.setattr(worlds, "host_free", lambda: 1 << 20)
    monkeypatch.setattr(exact, "_compare", lambda *_: True)  # small models before the large ones
    before = sorted(tmp_path.iterdir())
    assert main(["bench", name, *(word.replace("OUT", str(tmp_path)) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rank 0 needs " in said
    assert "its part of this host's free memory is " in said
    told, _, skip = said.rstrip().rpartition("; ")
    assert advice in told.rpartition(": ")[2]
    configured = name in ("memory", "exact")
    option = "--launch.skip_memory_check true" if configured else "--skip-memory-check"
    assert skip == f"{option} begins anyway"
    assert [path for path in tmp_path.rglob("*") if path not in before and path.is_file()] == [
        *(tmp_path / "model").glob("*")
    ]


def test_a_bench_that_skips_the_check_warns_and_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worlds, "host_free", lambda: 4 * GIB)
    monkeypatch.setattr(TrainBench, "measure", lambda *_: iter(["measured"]))
    assert main(["bench", "train", "--device", "cpu", "--skip-memory-check"]) == 0
    said = capsys.readouterr()
    assert said.out == "measured\n"
    assert said.err.count("\n") == 1
    assert said.err.startswith("warning: bench train: rank 0 needs ")


def test_a_switch_needs_two_processes_that_have_room() -> None:
    """By hand: all weights of 2 bytes in dp 2, and half of them made, and again to be compared with."""
    bench = SwitchBench(model="7b", pairs=[((1, 1, 2), (1, 2, 1))], device="cpu")
    needed = bench.memory(World(1, 2, torch.device("cpu")))
    whole = 2 * bench.spec.parameters
    assert 2 * whole - GIB < needed.peak < 2 * whole + GIB
    with pytest.raises(UserError, match=r"^bench switch: rank 1 needs 25\.\d GiB, free are 4\.0; .*"):
        fit.require("bench switch", needed, FreeMemory(4 * GIB, "free are"), bench.smaller)
    fit.require("bench switch", needed, FreeMemory(needed.peak, "free are"), bench.smaller)


def test_toys_are_told_in_mib() -> None:
    small = RankMemory(0, {"model weights": 3 << 20}, {"training": {"model logits": 2 << 20}})
    with pytest.raises(
        UserError, match=r"^bench train: rank 0 needs 5\.0 MiB, free are 4\.5; most of it, 3\.0 MiB, is "
    ):
        fit.require("bench train", small, FreeMemory(9 << 19, "free are"), TrainBench.smaller)
    with pytest.raises(
        UserError, match=r"^rank 0 needs 5\.0 MiB in training, free are 4\.5; most of it, 3\.0 MiB"
    ):
        footprint.require([small], 9 << 19, "free are")


def test_nothing_of_a_model_lowers_what_the_bandwidth_takes() -> None:
    bench = GenerateBench(**TINY, sequences=(2,), prompt=(4, 4), new=4)
    needed = bench.memory(World(0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match=r"is copied bytes: .*free some of its memory$"):
        fit.require("bench generate", needed, FreeMemory(GIB, "free are"), bench.smaller)


def _folder(folder: Path) -> None:
    folder.mkdir()
    spec = replace(published("350m"), num_layers=1)
    (folder / "config.json").write_text(json.dumps(spec.to_hf()))


@pytest.mark.parametrize(
    ("bench", "stage"),
    [
        pytest.param(TrainBench(**TINY, **SHORT), "training", marks=pytest.mark.long),
        (TrainBench(**TINY, **SHORT, optimizer=True), "training"),
        pytest.param(
            GenerateBench(**TINY, sequences=(32,), prompt=(32, 32), new=4, modes=("eager",)),
            "generation",
            marks=pytest.mark.long,
        ),
    ],
    ids=["gradients", "adamw", "generation"],
)
def test_what_is_said_to_be_needed_is_what_is_taken(
    bench: harness.LayoutBench, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "copy_bandwidth", lambda _: 1.0)
    world = World(0, 1, torch.device("cpu"))
    needed = bench.memory(world)
    assert needed is not None
    meter = Meter()
    try:
        list(bench.measure(world))
        taken = meter.take(world.device)
    finally:
        meter.end()
    assert taken == pytest.approx(needed.total(stage), rel=0.1)


def test_a_host_has_free_what_its_narrowest_limit_leaves(tmp_path: Path) -> None:
    """Both kinds of control groups, one inside the other; a path that only a container's host sees."""

    def lay(**files: str) -> int | None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return host_free(tmp_path / "proc", tmp_path / "groups")

    assert lay() is None
    assert lay(proc__meminfo="MemTotal: 9000 kB\nMemAvailable:    4000 kB\n") == 4000 << 10
    group = {"proc__self__cgroup": "1:cpu:/other\n0::/a/b\n", "groups__a__memory_dot_max": "2000000\n"}
    group |= {"groups__a__memory_dot_current": "900000\n", "groups__a__b__memory_dot_max": "max\n"}
    group |= {"groups__a__memory_dot_stat": "anon 5\ninactive_file 400000\n"}
    assert lay(**group, groups__a__b__memory_dot_current="1\n") == 1_500_000
    stat = "anon 5\ninactive_file 400000\nactive_file 100000\n"
    assert lay(groups__a__memory_dot_stat=stat) == 1_600_000
    older = {"proc__self__cgroup": "4:cpu,memory:/of/the/host\n"}
    older |= {"groups__memory__memory_dot_limit_in_bytes": "1000000\n"}
    older |= {"groups__memory__memory_dot_usage_in_bytes": "1200000\n"}
    assert lay(**older, groups__memory__memory_dot_stat="total_inactive_file 300000\n") == 100_000
    both = "total_inactive_file 300000\ntotal_active_file 50000\n"
    assert lay(groups__memory__memory_dot_stat=both) == 150_000
    assert lay(groups__memory__memory_dot_stat="total_inactive_file 3\n") == 0


def test_this_host_has_memory() -> None:
    free = World(0, 1, torch.device("cpu")).free_memory()
    assert free is not None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free.bytes < total
    half = World(0, 1, torch.device("cpu"), per_node=2).free_memory()
    assert half is not None
    assert half.bytes == pytest.approx(free.bytes / 2, rel=0.2)
