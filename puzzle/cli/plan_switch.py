"""`puzzle plan switch`: what a change of layout moves, from where to where, without devices."""

from __future__ import annotations

import argparse
import json
import re
from math import prod
from pathlib import Path
from typing import Any

from puzzle.cli import Parser, named, real, whole
from puzzle.files.limits import MOST_BYTES, MOST_PROCESSES
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.describe import fill_table, switch_json, switch_table
from puzzle.plan.reshard.plan import MIB, SwitchPlan, check_shares, plan_switch
from puzzle.plan.reshard.routing import STRATEGIES
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import PUBLISHED, published


def run(arguments: list[str]) -> int:
    """Print the plan's table, or its numbers as JSON; with --out also draw who sends what to whom."""
    given = _parser().parse_args(arguments)
    if given.zero:
        check_shares("--zero", given.source[2], prod(given.destination))
    plan = _plan(given, given.zero)
    numbers = switch_json(plan)
    print(json.dumps(numbers, indent=2) if given.json else switch_table(plan, numbers))
    if given.zero and not given.json:
        print("\n" + fill_table(_plan(given, zero=False), plan))
    if given.out:
        _draw(given.out, numbers, quiet=given.json)
    return 0


def triple(text: str) -> tuple[int, int, int]:
    """tp,pp,dp from the command line."""
    parts = [part.strip() for part in text.split(",")]
    # Counted before they are read: Python is slow with thousands of digits.
    if len(parts) != 3 or not all(re.fullmatch("[0-9]{1,30}", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write tp,pp,dp, three whole numbers such as 2,8,1")
    tp, pp, dp = map(int, parts)
    if min(tp, pp, dp) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: tp, pp and dp are each at least 1")
    if tp * pp * dp > MOST_PROCESSES:
        most = f"at most {MOST_PROCESSES} are planned for"
        raise argparse.ArgumentTypeError(f"{text!r}: {tp * pp * dp} processes; {most}")
    return tp, pp, dp


def model_spec(name: str) -> ModelSpec:
    """A published size or a Hugging Face folder, with a language model's head."""
    if name.lower() in PUBLISHED or not name or not Path(name).exists():
        return published(name)
    from puzzle.config.sources import folder_spec

    return folder_spec("--model", Path(name), "lm")


def _parser() -> Parser:
    parser = Parser(prog="puzzle plan switch", description="Plan a change of a model's layout.")
    parser.add_argument("--from", dest="source", type=triple, required=True, metavar="TP,PP,DP")
    parser.add_argument("--to", dest="destination", type=triple, required=True, metavar="TP,PP,DP")
    parser.add_argument("--model", required=True, help=f"{', '.join(PUBLISHED)}, or a Hugging Face folder")
    parser.add_argument("--gpus-per-node", type=whole(1), default=8, metavar="N")
    parser.add_argument("--intra-gbs", type=real(0), default=Cluster.intra_gbs, help="GB/s inside a node")
    parser.add_argument("--inter-gbs", type=real(0), default=Cluster.inter_gbs, help="GB/s between nodes")
    parser.add_argument("--strategy", choices=STRATEGIES, default="planned")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--staging-bytes", type=whole(1, MOST_BYTES), default=256 * MIB, metavar="BYTES")
    parser.add_argument("--nest", action="store_true", help="stage borders on those of the layout before")
    parser.add_argument("--zero", action="store_true", help="out of ZeRO-1 shards, before they are gathered")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=named, metavar="DIR", help="draw who sends what to whom")
    return parser


def _plan(given: argparse.Namespace, zero: bool) -> SwitchPlan:
    spec = model_spec(given.model)
    sides = [Layout.even(*numbers, spec.num_layers) for numbers in (given.source, given.destination)]
    return plan_switch(
        spec,
        Placement.default(sides[0]),
        Placement.default(sides[1]),
        Cluster(given.gpus_per_node, given.intra_gbs, given.inter_gbs),
        strategy=given.strategy,
        itemsize={"bf16": 2, "fp32": 4}[given.dtype],
        staging_bytes=given.staging_bytes,
        nest=given.nest,
        zero=zero,
    )


def _draw(out: Path, numbers: dict[str, Any], quiet: bool) -> None:
    from puzzle.plotting.output import whole
    from puzzle.plotting.style import save
    from puzzle.plotting.switch import switch_figure

    with whole(out) as folder:
        save(switch_figure(numbers), folder / "switch")
        (folder / "switch.json").write_text(json.dumps(numbers))
    if not quiet:
        print(f"drawn in {out}: switch.png, switch.pdf; its numbers: switch.json")
