"""Who sends which rows to whom in a switch, and in which round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Coord, Placement
from puzzle.plan.reshard.overlap import Fragment, Rows, Unit

DIRECT = 1 << 20
"""Bytes of rows from which on they have a message of their own."""

Strategy = Literal["planned", "fixed-order", "gather-all"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Records = NDArray[np.void]
REMOTE: Any = np.dtype(
    [
        ("unit", "i4"),
        ("source", "i4"),
        ("destination", "i4"),
        ("source_start", "i8"),
        ("destination_start", "i8"),
        ("rows", "i8"),
        ("nbytes", "i8"),
        ("bucket", "i4"),
        ("packed", "?"),
    ]
)
"""Rows that travel. `unit` indexes `Rows.units()`; starts count rows of the two ranks' storages (of the whole
storage on the destination side of gather-all)."""

LOCAL: Any = np.dtype(
    [("unit", "i4"), ("rank", "i4"), ("source_start", "i8"), ("destination_start", "i8"), ("rows", "i8")]
)
"""Rows that a rank already has."""


class _Need(NamedTuple):
    nbytes: int
    unit: int
    rank: int
    fragment: Fragment


def route(
    rows: Rows, source: Placement, destination: Placement, cluster: Cluster, strategy: Strategy
) -> tuple[Records, Records]:
    """REMOTE and LOCAL records, by unit, of what every destination rank needs (of gather-all: everything).

    Rows that several ranks could send come from the receiver's node if a holder is there, and among those
    from the one with the least to send; in fixed order, from the replica of the same number.
    """
    units = tuple(rows.units())
    needs, local = [], []
    for rank in sorted(destination.ranks):
        mine = source.coord_of(rank) if rank in source else None
        for index, fragment in _needed(units, destination.coord_of(rank), strategy):
            unit = units[index]
            here = None
            if mine is not None and mine.p in unit.source:
                here = fragment.holders.get(rows.holder(mine))
            if here is not None:
                local.append((index, rank, here, fragment.start, fragment.rows))
            else:
                needs.append(_Need(fragment.rows * unit.kind.row_bytes, index, rank, fragment))
    if strategy == "fixed-order":
        senders = [_by_number(rows, destination, units[need.unit], need) for need in needs]
    else:
        needs.sort(key=lambda need: -need.nbytes)
        senders = _balanced(rows, source, units, needs, cluster)
    remote = [
        (
            n.unit,
            source.rank_of(c),
            n.rank,
            n.fragment.holders[rows.holder(c)],
            n.fragment.start,
            n.fragment.rows,
            n.nbytes,
        )
        for n, c in zip(needs, senders, strict=True)
    ]
    records = np.empty(len(remote), REMOTE)
    records[:] = [(*record, 0, False) for record in sorted(remote)]
    kept = np.empty(len(local), LOCAL)
    kept[:] = sorted(local)
    return records, kept


def _needed(units: tuple[Unit, ...], coord: Coord, strategy: Strategy) -> Iterator[tuple[int, Fragment]]:
    for index, unit in enumerate(units):
        if strategy == "gather-all":
            wanted = unit.kind.whole
        elif coord.p in unit.destination:
            wanted = unit.kind.fragments[coord.t]
        else:
            continue
        for fragment in wanted:
            yield index, fragment


def _by_number(rows: Rows, destination: Placement, unit: Unit, need: _Need) -> Coord:
    replicas = rows.coords(min(need.fragment.holders), min(unit.source))
    return replicas[destination.coord_of(need.rank).d % len(replicas)]


def _balanced(
    rows: Rows, source: Placement, units: tuple[Unit, ...], needs: list[_Need], cluster: Cluster
) -> list[Coord]:
    """A sender for each need, largest first: the holder that is done soonest (Graham's LPT rule).

    The smallest hundredth of what a rank needs (norms, mostly) rather comes from who has a message for it.
    """
    small = _small(needs)
    seconds: defaultdict[int, float] = defaultdict(float)
    pairs: set[tuple[int, int]] = set()
    known: dict[tuple[tuple[int, ...], tuple[int, ...], int], list[tuple[int, Coord, float]]] = {}
    chosen = []
    for number, need in enumerate(needs):
        stages, numbers = tuple(units[need.unit].source), tuple(need.fragment.holders)
        key = (stages, numbers, cluster.node_of(need.rank))
        if key not in known:
            coords = [coord for p in stages for number in numbers for coord in rows.coords(number, p)]
            holders = [(source.rank_of(c), c, cluster.rate(source.rank_of(c), need.rank)) for c in coords]
            fastest = max(rate for _, _, rate in holders)
            known[key] = sorted(holder for holder in holders if holder[2] == fastest)
        paired = [h for h in known[key] if (h[0], need.rank) in pairs] if number in small else []
        rank, coord, rate = min(paired or known[key], key=lambda holder: seconds[holder[0]])
        seconds[rank] += need.nbytes / rate
        pairs.add((rank, need.rank))
        chosen.append(coord)
    return chosen


def _small(needs: list[_Need]) -> set[int]:
    """Indices of the smallest needs (the list is in descending order), up to 1 % of a rank's bytes."""
    total: defaultdict[int, int] = defaultdict(int)
    for need in needs:
        total[need.rank] += need.nbytes
    tail, found = dict.fromkeys(total, 0), set()
    for number in reversed(range(len(needs))):
        rank = needs[number].rank
        tail[rank] += needs[number].nbytes
        if 100 * tail[rank] <= total[rank]:
            found.add(number)
    return found


def assign_buckets(remote: Records, staging_bytes: int) -> int:
    """Fill in `bucket` and `packed` of planned records; the number of buckets.

    Rows of fewer than `DIRECT` bytes share a message with others of their pair and bucket. A bucket holds
    whole units, in order, as many as keep every rank's packed bytes (sent and received) within
    `staging_bytes`. A unit with more to pack than that travels unpacked.
    """
    if not len(remote):
        return 0
    world = int(max(remote["source"].max(), remote["destination"].max())) + 1
    bucket, staged = 0, np.zeros(world, np.int64)
    borders = np.flatnonzero(np.diff(remote["unit"])) + 1
    for part in np.split(remote, borders):  # views: assignments below reach `remote`
        small = part["nbytes"] < DIRECT
        adds = _per_rank(part[small], world)
        if adds.max() > staging_bytes:
            small[:] = False
            adds[:] = 0
        if (staged + adds).max() > staging_bytes:
            bucket, staged = bucket + 1, np.zeros_like(staged)
        staged = staged + adds
        part["bucket"], part["packed"] = bucket, small
    _unpack_lone(remote)
    return bucket + 1


def _per_rank(part: Records, world: int) -> NDArray[np.int64]:
    """Bytes sent and received by each rank."""
    sent, received = (np.bincount(part[side], part["nbytes"], world) for side in ("source", "destination"))
    return (sent + received).astype(np.int64)


def _unpack_lone(remote: Records) -> None:
    """What would be alone in its packed message goes straight from storage to storage."""
    packed = np.flatnonzero(remote["packed"])
    pairs = np.stack([remote[field][packed] for field in ("bucket", "source", "destination")])
    _, inverse, counts = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    remote["packed"][packed[counts[inverse.ravel()] == 1]] = False
