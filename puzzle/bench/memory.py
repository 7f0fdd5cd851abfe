"""`puzzle bench memory`: iterations on random models, each rank's peak per stage beside the formula's."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.cli import Parser, named, whole
from puzzle.cli.plan_switch import triple
from puzzle.config import memory_report as footprint
from puzzle.config.base import ROLES
from puzzle.config.load import build, merge, parse_overrides
from puzzle.config.resolve import resolve
from puzzle.config.run import TRAINED, TrainConfig
from puzzle.errors import UserError
from puzzle.files.limits import MOST_LAYERS
from puzzle.launch import local
from puzzle.plan.memory import RankMemory
from puzzle.rlhf.requirements import check_packages
from puzzle.runlog import Run, load_runs

BAR = 0.1
"""How far a measured peak may be from the formula, as a share of it."""
DEFAULTS: dict[str, Any] = {
    "iterations": 2,
    "batch": 32,
    "dtype": "bf16",
    "data": {"random_tokens": 256},
    "generation": {"min_new_tokens": 256, "max_new_tokens": 256},
    "algorithm": {"microbatch": 4},
    "checkpoint": {"save": False},
    "log": {"samples": 0, "plots": False},
}


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank in one stage: by the formula, and measured (None where a device does not count)."""

    rank: int
    stage: str
    formula: int
    measured: int | None

    @property
    def ratio(self) -> float:
        """Measured over formula; NaN without a measurement."""
        return math.nan if self.measured is None else self.measured / self.formula

    @property
    def ok(self) -> bool:
        """Whether the formula is within `BAR`; NaN never is."""
        return abs(self.ratio - 1.0) <= BAR


def run(arguments: Sequence[str]) -> int:
    """Run every layout; 1 if a peak was measured that is further than `BAR` from the formula."""
    parser = Parser(
        "puzzle bench memory",
        description="Train random models; measure each rank's peak memory per stage beside the formula.",
        epilog="Every key of the configuration is an option, --section.key VALUE, as of puzzle train.",
        allow_abbrev=False,
    )
    parser.add_argument("--layouts", nargs="+", type=triple, default=[(1, 1, 1)], metavar="TP,PP,DP")
    parser.add_argument("--models", nargs=2, default=["7b", "350m"], metavar=("ACTOR", "CRITIC"))
    parser.add_argument("--layers", type=whole(1, MOST_LAYERS), help="keep that many of each model only")
    parser.add_argument("--out", type=named, required=True, metavar="DIR", help="for logs and memory.jsonl")
    given, overrides = parser.parse_known_args(arguments)
    layouts = dict.fromkeys(given.layouts)
    configs = {layout: configured(layout, given.models, given.layers, overrides) for layout in layouts}
    for config in configs.values():
        check_packages(config)
    plans = {layout: resolve(config) for layout, config in configs.items()}
    good = True
    for layout, config in configs.items():
        folder = given.out / "-".join([*given.models, *map(str, layout)])
        if folder.exists():
            raise UserError(f"--out {given.out}: already holds {folder.name}; choose another folder")
        folder.mkdir(parents=True)
        try:
            local.run("puzzle.rlhf.trainer:train", (config, folder), config.world, folder / "ranks")
        except UserError:  # nothing stands in the way of the next try
            if not (folder / "run.jsonl").exists():
                shutil.rmtree(folder)
            raise
        (measured,) = load_runs(folder).runs
        found = peaks(footprint.estimate(plans[layout], fused=config.device != "cpu"), measured)
        where = {"actor": measured.actor, "critic": measured.critic, "layout": ",".join(map(str, layout))}
        _report(where["layout"], config, measured, found)
        with (given.out / "memory.jsonl").open("a") as file:
            for peak in found:
                sizes = {"formula_bytes": peak.formula, "measured_bytes": peak.measured}
                row = {"bench": "memory", **where, "rank": peak.rank, "stage": peak.stage, **sizes}
                file.write(json.dumps(row) + "\n")
        good &= all(peak.ok for peak in found if peak.measured is not None)
    return 0 if good else 1


def configured(
    layout: tuple[int, int, int], models: Sequence[str], layers: int | None, overrides: Sequence[str]
) -> TrainConfig:
    """The run of one layout; `overrides` are options of the command line and win."""
    actor, critic = ({"init": {"preset": name}, "layers": layers} for name in models)
    sizes = dict(zip(("tp", "pp", "dp"), layout, strict=True))
    roles = {"actor": actor, "critic": critic, "reward": critic, "layout": sizes}
    roles["generation"] = {"keep_graphs": False}  # auto depends on the device, the formula here does not
    given = parse_overrides(overrides)
    if "critic" not in TRAINED.get(given.get("algorithm", {}).get("name", "ppo"), ROLES):
        del roles["critic"]
    return build(merge(DEFAULTS, roles, given), lambda key: "the command line")


def peaks(ranks: Sequence[RankMemory], run: Run) -> list[Peak]:
    """Every rank's stages beside what the run's log says of them.

    Generation begins with what is there before offloaded states have left.
    """
    logged: dict[int, Mapping[str, int]] = {r["rank"]: r.get("peak_bytes", {}) for r in run.ranks}
    found = []
    for memory in ranks:
        sizes = {stage: memory.total(stage) for stage in memory.stages}
        switch, made = memory.stages["switch"], memory.stages["generation"]
        staging = switch["generation weights and staging"] - made["generation weights"]
        sizes["generation"] = max(sizes["generation"], sizes["switch"] - staging)
        if not run.switches:
            del sizes["switch"]
        measured = logged[memory.rank]
        found += [Peak(memory.rank, stage, size, measured.get(stage)) for stage, size in sizes.items()]
    return found


def _report(layout: str, config: TrainConfig, run: Run, found: Sequence[Peak]) -> None:
    last = run.iterations[-1]
    times = ", ".join(f"{name} {seconds:.3f}" for name, seconds in last.stage_seconds.items() if seconds)
    print(f"memory {run.pair}  tp,pp,dp {layout}  batch {config.batch}  {config.dtype}")
    print(f"  iteration {last.iteration}: {last.e2e_seconds:.3f} s ({times})")
    print(f"  {'rank':>4} {'stage':<11}{'formula GiB':>12}{'measured':>10}{'ratio':>8}")
    for peak in found:
        line = f"  {peak.rank:>4} {peak.stage:<11}{peak.formula / footprint.GIB:12.2f}"
        if peak.measured is None:
            print(f"{line}{'-':>10}")
        else:
            verdict = "" if peak.ok else "  FAIL"
            print(f"{line}{peak.measured / footprint.GIB:10.2f}{peak.ratio:8.3f}{verdict}")
    for record in run.ranks:
        for name, size in record.get("device_bytes", {}).items():
            print(f"  rank {record['rank']}: {size / footprint.GIB:.2f} GiB {name}", flush=True)
