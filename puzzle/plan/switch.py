"""Switch plans: how the weights of a model get from one placement to another.

Storages differ only in which rows they hold (`plan.shards`), so all that moves is ranges of whole rows,
contiguous in memory on both sides. Every rank makes the same plan and takes its own part of it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.shards import LocalParam, local_params
from puzzle.plan.switch_roles import RoleCosts, Roles, choose_roles, role_costs
from puzzle.plan.switch_route import STRATEGIES, Records, Strategy, assign_buckets, route
from puzzle.plan.switch_rows import Rows, Unit
from puzzle.spec.model import ModelSpec

MIB = 1 << 20


class RowRange(NamedTuple):
    """Rows [start, start + rows) of the storage `name`."""

    name: str
    start: int
    rows: int


class Transfer(NamedTuple):
    """One message to or from `peer`: these rows in this order, through one buffer if `parts` are several."""

    peer: int
    parts: tuple[RowRange, ...]
    nbytes: int


class Move(NamedTuple):
    """Rows of one storage of a rank that become rows of another storage of the same rank."""

    source: RowRange
    destination: RowRange


@dataclass(frozen=True)
class Bucket:
    """Messages that are under way together; both ends have a message in the bucket of the same index, and
    messages of a pair in the same order.

    With a `scratch` shape, messages arrive in a storage of that shape (called `scratch` in row ranges)
    instead of destination storages: the rank adds the rows that it has (`gathers`, from source storages),
    then takes what it needs (`slices`, into destination storages).
    """

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    scratch: tuple[int, ...] | None = None
    gathers: tuple[Move, ...] = ()
    slices: tuple[Move, ...] = ()


@dataclass(frozen=True)
class RankPlan:
    """What one rank does.

    `aliases`: destination storages that are rows of a source storage; `allocate`: all the others (rows that
    no piece covers must be zero); `copies` fill these from source storages. `peak_extra` in bytes.
    """

    rank: int
    aliases: tuple[Move, ...]
    allocate: tuple[LocalParam, ...]
    copies: tuple[Move, ...]
    buckets: tuple[Bucket, ...]
    peak_extra: int


@dataclass(frozen=True)
class SwitchPlan:
    """A whole switch. `remote` and `local` are records of `plan.switch_route`; bytes are of all ranks
    together unless said otherwise; `fixed_order_bytes` is what the roles in rank order would receive."""

    spec: ModelSpec
    source: Placement
    destination: Placement
    cluster: Cluster
    strategy: Strategy
    itemsize: int
    roles_exact: bool
    tp_inside_nodes: bool
    num_buckets: int
    fixed_order_bytes: int
    remote: Records = field(repr=False, compare=False)
    local: Records = field(repr=False, compare=False)
    hash: str

    @cached_property
    def rows(self) -> Rows:
        """The overlap of the two layouts."""
        return Rows(self.spec, self.source.layout, self.destination.layout, self.itemsize)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What the records' `unit` indexes."""
        return tuple(self.rows.units())

    @cached_property
    def costs(self) -> RoleCosts:
        """What each destination rank needs and has."""
        return role_costs(self.rows, self.source, tuple(sorted(self.destination.ranks)), self.cluster)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that take part, ascending."""
        return tuple(sorted({*self.source.ranks, *self.destination.ranks}))

    @property
    def bytes_received(self) -> int:
        """Bytes that travel."""
        return int(self.remote["nbytes"].sum())

    @cached_property
    def needed_bytes(self) -> dict[int, int]:
        """Bytes of weights of each destination rank."""
        layout = self.destination.layout
        coords = {rank: self.destination.coord_of(rank) for rank in self.costs.ranks}
        return {rank: int(self.costs.needed[c.p * layout.tp + c.t]) for rank, c in coords.items()}

    @cached_property
    def local_bytes(self) -> dict[int, int]:
        """Bytes of its weights that each destination rank has before the switch."""
        layout, found = self.destination.layout, {}
        for row, rank in enumerate(self.costs.ranks):
            coord = self.destination.coord_of(rank)
            found[rank] = int(self.costs.local[row, coord.p * layout.tp + coord.t])
        return found

    @property
    def lower_bound_bytes(self) -> int:
        """Bytes that are not where these roles need them: no switch to this placement receives less."""
        return sum(self.needed_bytes.values()) - sum(self.local_bytes.values())

    @property
    def local_share(self) -> float:
        """Part of the destination weights that is already where it must be."""
        return sum(self.local_bytes.values()) / sum(self.needed_bytes.values())

    @cached_property
    def pairs(self) -> dict[tuple[int, int], int]:
        """Bytes by (source rank, destination rank)."""
        found: defaultdict[tuple[int, int], int] = defaultdict(int)
        for record in self.remote[["source", "destination", "nbytes"]].tolist():
            found[record[0], record[1]] += record[2]
        return dict(sorted(found.items()))

    def traffic(self, rank: int) -> tuple[int, int]:
        """Bytes that a rank sends and receives."""
        return (
            sum(nbytes for (source, _), nbytes in self.pairs.items() if source == rank),
            sum(nbytes for (_, destination), nbytes in self.pairs.items() if destination == rank),
        )

    @cached_property
    def seconds_model(self) -> float:
        """The busiest direction of the busiest rank at the cluster's rates, and one latency per bucket."""
        busy: defaultdict[tuple[str, int], float] = defaultdict(float)
        for (source, destination), nbytes in self.pairs.items():
            seconds = nbytes / self.cluster.rate(source, destination)
            busy["out", source] += seconds
            busy["in", destination] += seconds
        return max(busy.values(), default=0.0) + self.num_buckets * self.cluster.latency

    @cached_property
    def _scratch_bytes(self) -> int:
        if self.strategy != "gather-all":
            return 0
        return max(unit.kind.shape[0] * unit.kind.row_bytes for unit in self.units)

    @property
    def depth(self) -> int:
        """Buckets under way at a time: the next one travels while the former is unpacked."""
        return 2 if self.strategy == "planned" else 1

    def for_rank(self, rank: int) -> RankPlan:
        """The part of one rank; an empty one if it takes no part."""
        return _RankPart(self, rank).plan()


class _RankPart:
    """Turns one rank's records into row ranges of named storages."""

    def __init__(self, plan: SwitchPlan, rank: int) -> None:
        self.whole, self.rank = plan, rank
        self.had = plan.source.coord_of(rank) if rank in plan.source else None
        self.gets = plan.destination.coord_of(rank) if rank in plan.destination else None
        self.gathers = plan.strategy == "gather-all"
        self.local: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for unit, *rows in plan.local[plan.local["rank"] == rank][
            ["unit", "source_start", "destination_start", "rows"]
        ].tolist():
            self.local[unit].append(tuple(rows))

    def plan(self) -> RankPlan:
        aliases, allocate, copies = [], [], []
        extra = 0
        for index, param in self._destination():
            unit, moves = self.whole.units[index], self._moves(index)
            if not self.gathers and self._is_alias(unit, index):
                offset = moves[0].source.start - moves[0].destination.start
                source = RowRange(moves[0].source.name, offset, param.rows)
                aliases.append(Move(source, RowRange(param.name, 0, param.rows)))
            else:
                allocate.append(param)
                extra += param.rows * unit.kind.row_bytes
                copies += [] if self.gathers else moves
        buckets, staging = self._buckets()
        extra += staging + (self.whole._scratch_bytes if self.gets else 0)
        return RankPlan(self.rank, tuple(aliases), tuple(allocate), tuple(copies), buckets, extra)

    def _destination(self) -> Iterable[tuple[int, LocalParam]]:
        if self.gets is None:
            return []
        params = local_params(self.whole.spec, self.whole.destination.layout, self.gets)
        by_name = {param.name: param for param in params}
        p = self.gets.p
        return [(i, by_name[u.destination[p]]) for i, u in enumerate(self.whole.units) if p in u.destination]

    def _moves(self, index: int) -> list[Move]:
        """What the rank itself has of a unit, to where it belongs."""
        unit, found = self.whole.units[index], []
        for start, to, rows in self.local[index]:
            assert self.had is not None
            assert self.gets is not None
            name = "scratch" if self.gathers else unit.destination[self.gets.p]
            found.append(Move(RowRange(unit.source[self.had.p], start, rows), RowRange(name, to, rows)))
        return found

    def _is_alias(self, unit: Unit, index: int) -> bool:
        """Whether the destination storage, padding included, is one row range of a source storage."""
        assert self.gets is not None
        have, fragments = self.local[index], unit.kind.fragments[self.gets.t]
        if not have or len(have) < len(fragments):
            return False
        offset = have[0][0] - have[0][1]
        in_line = all(start - to == offset for start, to, _ in have)
        return in_line and 0 <= offset <= unit.kind.source_rows - unit.kind.destination_rows

    def _buckets(self) -> tuple[tuple[Bucket, ...], int]:
        """The buckets, and the largest staging of those under way together in bytes."""
        remote, rank = self.whole.remote, self.rank
        out = self._messages(remote[remote["source"] == rank], sending=True)
        into = self._messages(remote[remote["destination"] == rank], sending=False)
        buckets, packed = [], []
        for index in range(self.whole.num_buckets):
            sends, receives = tuple(out[index]), tuple(into[index])
            packed.append(sum(t.nbytes for t in (*sends, *receives) if len(t.parts) > 1))
            if self.gathers and self.gets:
                shape = self.whole.units[index].kind.shape
                gathers, slices = tuple(self._moves(index)), self._slices(index)
                buckets.append(Bucket(sends, receives, shape, gathers, slices))
            else:
                buckets.append(Bucket(sends, receives))
        depth = self.whole.depth
        staging = max((sum(packed[i : i + depth]) for i in range(len(packed))), default=0)
        return tuple(buckets), staging

    def _messages(self, records: Records, sending: bool) -> defaultdict[int, list[Transfer]]:
        """Messages by bucket: to each peer the packed one first, then the others by unit."""
        near, far = ("source", "destination") if sending else ("destination", "source")
        coord = self.had if sending else self.gets
        parts: defaultdict[tuple[int, int, int], list[tuple[RowRange, int]]] = defaultdict(list)
        fields = ["unit", far, f"{near}_start", "rows", "nbytes", "bucket", "packed"]
        for number, record in enumerate(records[fields].tolist()):
            unit, peer, start, rows, nbytes, bucket, packed = record
            assert coord is not None
            names = self.whole.units[unit].source if sending else self.whole.units[unit].destination
            name = "scratch" if self.gathers and not sending else names[coord.p]
            key = (bucket, peer, -1 if packed else number)
            parts[key].append((RowRange(name, start, rows), nbytes))
        world = self.whole.ranks[-1] + 1
        # Every rank begins with its next neighbour, so that no peer is everyone's first.
        step = -1 if not sending else 1
        found: defaultdict[int, list[Transfer]] = defaultdict(list)
        for bucket, peer, number in sorted(
            parts, key=lambda k: (k[0], step * (k[1] - self.rank) % world, k[2])
        ):
            ranges = parts[bucket, peer, number]
            nbytes = sum(size for _, size in ranges)
            found[bucket].append(Transfer(peer, tuple(part for part, _ in ranges), nbytes))
        return found

    def _slices(self, index: int) -> tuple[Move, ...]:
        unit = self.whole.units[index]
        assert self.gets is not None
        if self.gets.p not in unit.destination:
            return ()
        name, spans = unit.destination[self.gets.p], unit.kind.spans[self.gets.t]
        return tuple(
            Move(RowRange("scratch", s.start, s.stop - s.start), RowRange(name, s.at, s.stop - s.start))
            for s in spans
        )


def plan_switch(
    spec: ModelSpec,
    source: Placement,
    destination: Placement,
    cluster: Cluster,
    *,
    strategy: Strategy = "planned",
    itemsize: int = 2,
    staging_bytes: int = 256 * MIB,
    direct_bytes: int = MIB,
    bucket_bytes: int | None = None,
    nest: bool = False,
) -> SwitchPlan:
    """How `spec`'s weights get from `source` to the layout and the ranks of `destination`.

    `planned` chooses anew which of these ranks plays which coordinate (and with `nest`, the stages: borders
    on those of the source); `fixed-order` keeps `destination` as it is and moves storage by storage;
    `gather-all` does too and gives every rank every whole storage, to take its rows from. `itemsize` is bytes
    per element; `staging_bytes`, `direct_bytes` and `bucket_bytes` are explained at
    `switch_route.assign_buckets`.
    UserError for layouts that the model cannot have and for too little staging memory.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"no switch strategy {strategy!r}; use one of {', '.join(STRATEGIES)}")
    source.layout.check(spec)
    if nest:
        old = destination.layout
        destination = replace(destination, layout=Layout.nested(old.tp, old.pp, old.dp, source.layout))
    destination.layout.check(spec)
    rows = Rows(spec, source.layout, destination.layout, itemsize)
    costs = role_costs(rows, source, tuple(sorted(destination.ranks)), cluster)
    fixed_bytes = costs.of(destination)[1]
    roles = Roles(destination, False, False)
    if strategy == "planned":
        roles = choose_roles(costs, destination.layout, cluster)
    if strategy == "gather-all":
        _check_scratch(rows, staging_bytes)
    remote, local = route(rows, source, roles.placement, cluster, strategy)
    if strategy == "planned":
        # Two buckets are under way at a time.
        buckets = assign_buckets(remote, staging_bytes // 2, direct_bytes, bucket_bytes)
    else:
        remote["bucket"] = remote["unit"]
        buckets = len(tuple(rows.units()))
    remote.setflags(write=False)
    local.setflags(write=False)
    fields = (spec, source, roles.placement, cluster, strategy, itemsize)
    digest = hashlib.sha256(repr((fields, buckets)).encode() + remote.tobytes() + local.tobytes()).hexdigest()
    return SwitchPlan(*fields, roles.exact, roles.inside_nodes, buckets, fixed_bytes, remote, local, digest)


def _check_scratch(rows: Rows, staging_bytes: int) -> None:
    largest = max(rows.units(), key=lambda unit: unit.kind.shape[0] * unit.kind.row_bytes)
    needed = largest.kind.shape[0] * largest.kind.row_bytes
    if needed > staging_bytes:
        raise UserError(
            f"switch strategy gather-all needs {needed} bytes of staging for the whole of {largest.name},"
            f" {staging_bytes} are allowed: raise switch.staging_bytes or use the strategy planned"
        )
