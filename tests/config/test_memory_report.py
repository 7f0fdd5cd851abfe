"""The memory report: a table for every published experiment, refusals, and the advice that they give."""

from __future__ import annotations

import json
import re

import pytest
import torch

from puzzle.campaign import experiments
from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.engine.pipeline.stage import StageRun
from puzzle.plan import memory
from tests.sizes import SIZES

GIB = footprint.GIB


def test_every_published_experiment_has_a_table() -> None:
    table = experiments.read_table()
    runs = experiments.expand(table, experiments.Selection("paper"))
    assert len(runs) > 20
    for run in runs:
        ranks = footprint.estimate(resolve(run.config), fused=True)
        assert len(ranks) == run.config.world
        text = footprint.table(ranks)
        assert "weights" in text
        if run.config.log.variant != "dschat":  # another program, whose memory is not modelled
            footprint.require(ranks, footprint.parse_bytes("80GB"))


CONFIG = """\
actor: {init: {preset: 7b}, layout: {pp: 4}}
layout: {pp: 4}
batch: 64
dtype: bf16
reward: {init: {preset: 350m}}
data: {random_tokens: 256}
generation: {max_new_tokens: 256}
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--algorithm.microbatch", "64"],
            "rank 0 needs .* GiB in training, its device has 74.5; most of it, .*: .*",
        ),
        (["--algorithm.microbatch", "2", "--critic.init.preset", "350m"], None),
        ([], None),  # four passes per stage, and no more than 16384 tokens in one
        (
            ["--algorithm.microbatch", "2", "--layout.pp", "1", "--actor.layout.pp", "1"],
            "is actor moments: raise",
        ),
        (["--device-memory", "much"], "--device-memory much: give a number and GB"),
    ],
)
def test_dry_run_refuses_what_cannot_fit(tmp_path, capsys, options: list[str], words: str | None) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    start = ["train", "--config", str(tmp_path / "run.yaml"), "--dry-run=json", "--device-memory", "80GB"]
    assert main([*start, *options]) == (0 if words is None else 2)
    out, err = capsys.readouterr()
    if "much" not in options:  # which is refused before anything is read
        assert json.loads(out)["dtype"] == "bf16"
        assert "device memory in GiB" in err
    if words is not None:
        assert re.search(f"^error: .*{words}", err.splitlines()[-1])


@pytest.mark.parametrize(
    ("resident", "stages", "advice"),
    [
        ({"reference weights": 9}, {"training": {"actor gradients": 1}}, "set offload.reference"),
        ({"reward weights": 9}, {"generation": {"generation kv cache": 1}}, "set offload.reward"),
        ({"reward weights": 9}, {"inference": {"reward one layer": 1}}, "raise reward.layout.tp or pp"),
        ({"actor moments": 9}, {"generation": {"generation kv cache": 1}}, "set offload.optimizer"),
        ({"critic masters": 9}, {"training": {}}, "raise critic.layout.dp, tp or pp"),
        ({}, {"training": {"actor moments": 9}}, "raise actor.layout.dp, tp or pp"),
        ({}, {"generation": {"generation weights": 9}}, "choose a generation.layout nearer to the actor's"),
        ({"actor weights": 9}, {"training": {}}, "raise actor.layout.tp or pp"),
    ],
)
def test_what_can_be_offloaded_is_offloaded_first(resident: dict, stages: dict, advice: str) -> None:
    assert footprint.remedy(memory.RankMemory(0, resident, stages)).split(": ")[1].startswith(advice)


def test_offloading_lowers_every_stage_but_its_own() -> None:
    config = load_config(None, words("--device", "cuda"))
    away = load_config(None, words("--device", "cuda", *(f"--offload.{k}=true" for k in OFFLOADS)))
    for plain, less in zip(
        *(footprint.estimate(resolve(c), fused=True) for c in (config, away)), strict=True
    ):
        assert less.total("training") == plain.total("training") - weights_of(plain, "reference", "reward")
        states = sum(size for name, size in plain.resident.items() if name.endswith(("moments", "masters")))
        assert less.total("inference") == plain.total("inference") - states
        assert less.host == states + weights_of(plain, "reference", "reward")
        assert less.total("generation") == plain.total("generation") - less.host
    assert f"offloaded to host memory: up to {less.host / GIB:.2f}" in footprint.table([less])


OFFLOADS = ("optimizer", "reference", "reward")


def words(*options: str) -> list[str]:
    model = ["--actor.init.preset", "7b", "--reward.init.preset", "350m", "--dtype", "bf16"]
    return [*model, "--data.random_tokens", "256", "--layout.pp", "2", *options]


def weights_of(memory: memory.RankMemory, *roles: str) -> int:
    return sum(memory.resident[f"{role} weights"] for role in roles)


def test_running_out_of_memory_prints_the_table(tmp_path, capsys, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.\nMore.")

    monkeypatch.setattr(StageRun, "compute", full)
    shape = [word for name, value in SIZES.items() for word in (f"--actor.init.{name}", str(value))]
    options = ["--reward.init.preset", "350m", "--reward.layers", "1", "--reward.init.vocab_size", "259"]
    run = ["train", "--data.random_tokens", "4", "--batch", "2", "--generation.max_new_tokens", "2"]
    assert main([*run, *shape, *options, "--device", "cpu", "--out", str(tmp_path / "o")]) == 2
    table, _, error = capsys.readouterr().err.rpartition("error: ")
    assert "device memory in MiB, all sequences at full length" in table
    assert re.fullmatch(r"CUDA out of memory on rank 0; most of it, [\d.]+ MiB, is .+: .+\n", error)


def test_tables_of_toys_are_in_smaller_units() -> None:
    """A model of a few thousand parameters has numbers, too; the two tables say the same."""
    sizes = dict.fromkeys(("one", "other"), 3 << 20)
    small = memory.RankMemory(0, sizes, {"training": {"third": 1 << 20}})
    large = memory.RankMemory(0, {n: 1024 * size for n, size in sizes.items()}, {"training": {"third": GIB}})
    tables = [footprint.table([rank]) for rank in (small, large)]
    assert tables[0].startswith("device memory in MiB, all sequences")
    assert tables[0].replace("MiB", "GiB") == tables[1]
    assert "        3.00  other" in tables[1]
