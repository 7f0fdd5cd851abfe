"""A switch plan for people and for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from puzzle.plan.cluster import GB
from puzzle.plan.layout import Coord, Placement
from puzzle.plan.reshard.plan import SwitchPlan

MAX_DRAWN = 32
SHADES = " .:-=+*#%@"


def switch_json(plan: SwitchPlan) -> dict[str, Any]:
    """The plan's numbers: bytes and seconds, of all ranks together and by rank and pair."""
    ranks = [_rank(plan, rank) for rank in plan.ranks]
    return {
        "strategy": plan.strategy,
        "from": _layout(plan.source),
        "to": _layout(plan.destination),
        "parameters": plan.spec.parameters,
        "bytes_per_element": plan.itemsize,
        "local_share": plan.local_share,
        "needed_bytes": sum(plan.needed_bytes.values()),
        "bytes_received": plan.bytes_received,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "fixed_order_bytes": plan.fixed_order_bytes,
        "seconds_model": plan.seconds_model,
        "peak_extra_bytes": max(rank["peak_extra_bytes"] for rank in ranks),
        "buckets": plan.num_buckets,
        "roles_exact": plan.roles_exact,
        "tp_inside_nodes": plan.tp_inside_nodes,
        "hash": plan.hash,
        "zero": plan.zero,
        "gather_bytes": sum(plan.gather_bytes.values()),
        "gather_seconds_model": plan.gather_seconds,
        "ranks": ranks,
        "pairs": [
            {"source": source, "destination": destination, "bytes": nbytes}
            for (source, destination), nbytes in plan.pairs.items()
        ],
    }


def switch_table(plan: SwitchPlan, numbers: Mapping[str, Any] | None = None) -> str:
    """The plan as text: totals, a line per rank, and a drawing of who sends how much to whom. `numbers`: what
    `switch_json` says of it, where that is known."""
    numbers = numbers or switch_json(plan)
    head = [
        f"switch {plan.source.layout} -> {plan.destination.layout} ({plan.strategy}), tp,pp,dp;"
        f" stages {_stages(plan.source)} -> {_stages(plan.destination)}",
        f"local share        {plan.local_share:.1%} of {_gb(numbers['needed_bytes'])}",
        f"received           {_gb(plan.bytes_received)}",
        f"lower bound        {_gb(plan.lower_bound_bytes)} for these roles",
        f"roles by rank      {_gb(plan.fixed_order_bytes)} would be received",
        f"modelled time      {plan.seconds_model * 1e3:.2f} ms in {plan.num_buckets} buckets",
        f"peak extra memory  {_gb(numbers['peak_extra_bytes'])} on one rank",
    ]
    if plan.strategy == "planned":
        proof = "proven best" if plan.roles_exact else "not proven best (the solver's time ran out)"
        place = "inside nodes" if plan.tp_inside_nodes else "NOT inside nodes: their sizes do not fit"
        head.append(f"roles              {proof}; tensor-parallel groups {place}")
    return "\n".join([*head, "", *_rank_lines(numbers["ranks"]), "", *_drawing(plan)])


def fill_table(gathered: SwitchPlan, shards: SwitchPlan) -> str:
    """What generation awaits after an optimizer step if it is filled from gathered weights or from ZeRO
    shards: bytes that the busiest rank receives, modelled milliseconds."""
    gather, switch, direct = max(gathered.gather_bytes.values()), *map(_busiest, (gathered, shards))
    ways = [
        ("gathered", gather + switch, gathered.gather_seconds + gathered.seconds_model, 0),
        ("gathered beside the critic's training", switch, gathered.seconds_model, gather),
        ("shards", direct, shards.seconds_model, gather),
    ]
    lines = [f"{'filled from':<38} {'awaited':>12} {'ms':>9} {'beside other work':>18}"]
    for name, nbytes, seconds, beside in ways:
        lines.append(f"{name:<38} {_gb(nbytes):>12} {seconds * 1e3:9.2f} {_gb(beside):>18}")
    return "\n".join(lines)


def _busiest(plan: SwitchPlan) -> int:
    return max(plan.traffic(rank)[1] for rank in plan.ranks)


def _rank(plan: SwitchPlan, rank: int) -> dict[str, Any]:
    sent, received = plan.traffic(rank)
    return {
        "rank": rank,
        "node": plan.cluster.node_of(rank),
        "source": _coord(plan.source, rank),
        "destination": _coord(plan.destination, rank),
        "needed_bytes": plan.needed_bytes.get(rank, 0),
        "local_bytes": plan.local_bytes.get(rank, 0),
        "received_bytes": received,
        "sent_bytes": sent,
        "peak_extra_bytes": plan.for_rank(rank).peak_extra,
    }


def _layout(placement: Placement) -> dict[str, Any]:
    layout = placement.layout
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "stage_layers": list(layout.stage_layers),
        "ranks": list(placement.ranks),
    }


def _coord(placement: Placement, rank: int) -> dict[str, int] | None:
    return placement.coord_of(rank)._asdict() if rank in placement else None


def _stages(placement: Placement) -> str:
    return ",".join(map(str, placement.layout.stage_layers))


def _rank_lines(ranks: list[dict[str, Any]]) -> list[str]:
    columns = ["rank", "node", "from t,p,d", "to t,p,d", "needs", "has", "receives", "sends", "extra"]
    lines = [columns]
    for row in ranks:
        names = [",".join(map(str, Coord(**row[k]))) if row[k] else "-" for k in ("source", "destination")]
        sizes = ("needed_bytes", "local_bytes", "received_bytes", "sent_bytes", "peak_extra_bytes")
        lines.append([str(row["rank"]), str(row["node"]), *names, *(_gb(row[size]) for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _drawing(plan: SwitchPlan) -> list[str]:
    """A matrix of shades: senders down, receivers across; by nodes where there are too many ranks."""
    unit, name = (lambda rank: rank), "rank"
    if len(plan.ranks) > MAX_DRAWN:
        unit, name = plan.cluster.node_of, "node"
    cells: defaultdict[tuple[int, int], int] = defaultdict(int)
    for (source, destination), nbytes in plan.pairs.items():
        cells[unit(source), unit(destination)] += nbytes
    if not cells:
        return ["nothing moves"]
    axis, most = sorted({unit(rank) for rank in plan.ranks}), max(cells.values())
    width = max(len(str(axis[-1])), 2) + 1
    lines = [f"who sends to whom (senders down, receivers across; by {name}; {SHADES[-1]} = {_gb(most)})"]
    lines.append(" " * width + "".join(str(column).rjust(width) for column in axis))
    for row in axis:
        # The lightest visible shade is for anything at all.
        shades = [SHADES[-(-cells[row, column] * (len(SHADES) - 1) // most)] for column in axis]
        lines.append((str(row).rjust(width) + "".join((shade * 2).rjust(width) for shade in shades)).rstrip())
    return lines


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.3f} GB"
