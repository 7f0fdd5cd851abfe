"""`puzzle plan search`: the layouts and options with which a configuration runs fastest, without devices."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from puzzle.cli import Parser, named, new_file, whole
from puzzle.cli.layouts import DEFAULT, TOP, Ranking, described, rank_plans
from puzzle.cli.plan_predict import grounds
from puzzle.config.memory_report import GIB
from puzzle.files import durable
from puzzle.files.limits import MOST_PROCESSES
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.job import IDEAS

MOST_PLANS = 100


def run(arguments: Sequence[str]) -> int:
    """Print the plans from the fastest on, each with what speaks against it."""
    parser = Parser(
        prog="puzzle plan search",
        description="Search layouts and options; keys of the configuration are options as in `puzzle train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=named, required=True, metavar="FILE", help="YAML file")
    parser.add_argument("--gpus", type=whole(1, MOST_PROCESSES), required=True, metavar="N", help="devices")
    parser.add_argument("--per-node", type=whole(1), default=8, metavar="N", help="devices of a machine")
    parser.add_argument("--top", type=whole(1, MOST_PLANS), default=TOP, metavar="K", help="plans to show")
    parser.add_argument("--calibration", default=DEFAULT, metavar="C", help="a file, or a name such as h200")
    parser.add_argument(
        "--lengths", metavar="L", help="fixed (default), exponential:MEAN, or a file of responses"
    )
    parser.add_argument("--without", nargs="+", default=[], choices=IDEAS, help="what no plan shall have")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=new_file, metavar="FILE", help="write it for `puzzle train --plan FILE`"
    )
    given, overrides = parser.parse_known_args(arguments)
    began, calibration = time.perf_counter(), read_calibration(given.calibration)
    place = (given.gpus, given.per_node)
    ranking = rank_plans(
        given.config, overrides, *place, calibration, given.top, given.lengths, given.without
    )
    took = time.perf_counter() - began
    values = described(ranking, given.gpus, given.per_node, given.calibration, calibration)
    if given.out is not None:
        durable.write_text(given.out, json.dumps(values, indent=1) + "\n")
    if given.json:
        print(json.dumps(values))
        return 0
    print(_table(ranking, values))
    found = ranking.found
    print(f"{found.choices} choices, {found.too_large} of those looked at too large; {took:.1f} s")
    print("\n".join(["tp, pp, dp; * is taken", *grounds(calibration, ranking.lengths, ranking.itemsize)]))
    return 0


def _table(ranking: Ranking, values: dict[str, Any]) -> str:
    lines = ["   seconds  generate   infer   train  switch     GiB  train -> generate, options"]
    for index, (plan, row) in enumerate(zip(ranking.plans, values["plans"], strict=True)):
        one, choice = plan.seconds, plan.choice
        layouts = " -> ".join(",".join(map(str, sizes)) for sizes in (choice.training, choice.generation))
        words = [f"micro-batches of {choice.microbatch}"]
        words += [
            word
            for word, on in (
                ("fused training", choice.fuse_training),
                ("fused inference", choice.fuse_inference),
                ("split backwards", choice.split),
                ("recompute", choice.recompute),
                ("offloaded optimizer", choice.offload),
                (f"decode micro-batches of {choice.decode}", choice.decode is not None),
                (f"{choice.slots} sequences of a replica at a time", choice.slots is not None),
            )
            if on
        ]
        mark = "*" if index == ranking.taken else " "
        lines.append(
            f"{mark}{one.total:9.2f} {one.generation:9.2f} {one.inference:7.2f} {one.training:7.2f}"
            f" {one.switch:7.3f} {plan.peak / GIB:7.1f}  {layouts}, {', '.join(words)}"
        )
        lines.append(f"{'':12}{row['why']}")
    return "\n".join(lines)
