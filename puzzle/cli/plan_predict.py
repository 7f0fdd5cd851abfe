"""`puzzle plan predict`: what an iteration of a configuration takes, stage by stage, without devices."""

from __future__ import annotations

import json
from dataclasses import replace

from puzzle.cli import Parser, named
from puzzle.cli.simulated import lengths_of, write_log
from puzzle.cli.workloads import remapped, workload_of
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.plan.memory import RankMemory
from puzzle.plan.predict.bounds import bounds
from puzzle.plan.predict.calibration import Calibration, read_calibration
from puzzle.plan.predict.iteration import predict
from puzzle.plan.predict.lengths import Lengths
from puzzle.plan.predict.rates import Rates
from puzzle.plan.predict.tables import Tables

STAGES = ("switch", "generation", "inference", "training")


def run(arguments: list[str]) -> int:
    """Print seconds per stage, and what they rest on."""
    parser = Parser(
        prog="puzzle plan predict",
        description="Predict an iteration; keys of the configuration are options, as in `puzzle train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=named, required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "--calibration", required=True, metavar="C", help="a file, or a name such as published-orion"
    )
    parser.add_argument(
        "--lengths", metavar="L", help="fixed (default), exponential:MEAN, or a file of responses"
    )
    parser.add_argument("--log", type=named, metavar="DIR", help="write a log (simulated) and a trace there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given, overrides = parser.parse_known_args(arguments)
    calibration = read_calibration(given.calibration)
    plan = resolve(load_config(given.config, overrides))
    costs = calibration.costs
    work = replace(workload_of(plan), lengths=lengths_of(given.lengths, plan.batch.response))
    ranks = footprint.estimate(plan, plan.config.device != "cpu", calibration.memory_bytes)
    work = remapped(work, ranks, calibration.memory_bytes)
    seconds = predict(work, costs)
    limits = bounds(work, costs)
    if given.log is not None:
        write_log(given.log, plan, work, seconds, given.calibration, calibration)
    stages = {name: getattr(seconds, name) for name in STAGES}
    most = max(ranks, key=lambda rank: rank.peak)
    if given.json:
        memory = {"rank": most.rank, "stage": most.worst, "bytes": most.peak, "of": calibration.memory_bytes}
        numbers = {
            "memory": memory,
            "stages": stages,
            "bounds": limits,
            "end_to_end": seconds.total,
            "rates": costs.values() if isinstance(costs, Rates) else None,
            "notes": costs.notes(),
        }
        print(json.dumps({**numbers, "calibration": given.calibration, "engine": calibration.engine}))
        return 0
    lines = [f"{name:<12}{value:10.3f} s   {limits[name]}" for name, value in stages.items()]
    lines += [f"{'end to end':<12}{seconds.total:10.3f} s", _memory(most, calibration.memory_bytes)]
    print("\n".join([*lines, *grounds(calibration, work.lengths, plan.itemsize)]))
    return 0


def _memory(most: RankMemory, limit: int) -> str:
    """The rank that needs most, and what to change where that is too much."""
    gib = footprint.GIB
    said = (
        f"rank {most.rank} needs most memory, {most.peak / gib:.1f} GiB of {limit / gib:.1f} in {most.worst}"
    )
    return said if most.peak <= limit else f"{said}: TOO MUCH; {footprint.remedy(most)}"


def other_dtype(known: int, itemsize: int) -> str:
    """A calibration is of another dtype than a run."""
    said = f"the calibration is of weights of {known} bytes, the run's have {itemsize} (dtype)"
    return f"{said}: seconds are not its"


def grounds(calibration: Calibration, lengths: Lengths | None, itemsize: int) -> list[str]:
    """What a prediction of a run with weights of `itemsize` bytes rests on, and what it knows nothing of."""
    measured = isinstance(calibration.costs, Tables)
    runs = ", ".join(calibration.runs) or ("its parts" if measured else "no run: all constants are expected")
    found = [
        f"for {calibration.device}, engine {calibration.engine}, {calibration.taken}; calibrated on {runs}"
    ]
    if calibration.spread:
        found.append(f"from data sheets: expect it to be off by {calibration.spread:.0%} either way")
    found.append(calibration.costs.describe())
    if not calibration.tensor_parallel:
        found.append("no tensor-parallel run was measured: expect layouts with tp to be 6-9 % off")
    if calibration.costs.nodes is None:
        found.append("one rate for links inside nodes and between them")
    found.append(
        "all sequences at full length"
        if lengths is None
        else f"prompts at full length, responses of {lengths.mean:.0f} tokens on average"
    )
    if (known := calibration.costs.item) != itemsize:
        found.append(other_dtype(known, itemsize))
    found += [f"outside of what was measured: {note}" for note in calibration.costs.notes()]
    return found
