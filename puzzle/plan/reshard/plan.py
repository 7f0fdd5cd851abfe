"""Switch plans: how the weights of a model get from one placement to another.

Storages differ only in which rows they hold (`plan.shards`), so all that moves is ranges of whole rows,
contiguous in memory on both sides. Every rank makes the same plan and takes its own part of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.reshard.overlap import Rows, Unit
from puzzle.plan.reshard.rank_plan import RankPart, RankPlan, Storages
from puzzle.plan.reshard.roles import RoleCosts, Roles, choose_roles, role_costs
from puzzle.plan.reshard.routing import STRATEGIES, Records, Strategy, assign_buckets, route
from puzzle.plan.shards import local_params, zero_rows
from puzzle.spec.model import ModelSpec

MIB = 1 << 20
MOST_SHARES = 8192
"""Source replicas x destination ranks of a plan out of ZeRO shards: some ten seconds."""

Transport = Literal["messages", "peer"]


@dataclass(frozen=True)
class SwitchPlan:
    """A whole switch. `remote` and `local` are records of `plan.switch_route`; bytes are of all ranks
    together unless said otherwise; `fixed_order_bytes` is what the roles in rank order would receive.
    `zero`: out of the rows that each replica has stepped, before they are gathered."""

    spec: ModelSpec
    source: Placement
    destination: Placement
    cluster: Cluster
    strategy: Strategy
    itemsize: int
    zero: bool
    roles_exact: bool
    tp_inside_nodes: bool
    num_buckets: int
    fixed_order_bytes: int
    remote: Records = field(repr=False, compare=False)
    local: Records = field(repr=False, compare=False)
    hash: str
    transport: Transport = "messages"

    def by_peer_copies(self) -> SwitchPlan:
        """The same plan, executed by copies out of peers' memory: without messages, without staging.

        UserError for gather-all, which is made of messages.
        """
        if self.strategy == "gather-all":
            raise UserError("switch.transport peer: the strategy gather-all needs messages; use auto")
        return replace(self, transport="peer")

    @cached_property
    def rows(self) -> Rows:
        """The overlap of the two layouts."""
        return Rows(self.spec, self.source.layout, self.destination.layout, self.itemsize, self.zero)

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
        sent, received = self._traffic
        return sent[rank], received[rank]

    @cached_property
    def _traffic(self) -> tuple[Counter[int], Counter[int]]:
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        for (source, destination), nbytes in self.pairs.items():
            sent[source] += nbytes
            received[destination] += nbytes
        return sent, received

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
    def gather_bytes(self) -> dict[int, int]:
        """What the all-gather after an optimizer step brings to each source rank."""
        return gathered_bytes(self.spec, self.source, self.itemsize)

    @cached_property
    def gather_seconds(self) -> float:
        """The same over the slowest link of a ring of replicas, on the busiest rank."""
        found = []
        for group in self.source.groups("dp"):
            rate = min(self.cluster.rate(a, b) for a, b in zip(group, (*group[1:], group[0]), strict=True))
            found += [self.gather_bytes[rank] / rate for rank in group]
        return max(found)

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes of the largest whole storage, of which gather-all takes rows."""
        if self.strategy != "gather-all":
            return 0
        return max(unit.kind.shape[0] * unit.kind.row_bytes for unit in self.units)

    @cached_property
    def storages(self) -> Storages:
        """What each destination rank holds in the end; replicas hold alike."""
        return Storages(self.spec, self.destination.layout)

    @property
    def depth(self) -> int:
        """Buckets under way at a time: the next one travels while the former is unpacked."""
        return 2 if self.strategy == "planned" else 1

    def for_rank(self, rank: int) -> RankPlan:
        """The part of one rank; an empty one if it takes no part."""
        return RankPart(self, rank).plan()


def gathered_bytes(spec: ModelSpec, placement: Placement, itemsize: int) -> dict[int, int]:
    """Bytes of other replicas' trained rows in each rank's storages."""
    layout, lacks = placement.layout, {}
    for p in range(layout.pp):
        # Tensor ranks have storages of one shape.
        params = [param for param in local_params(spec, layout, Coord(0, p, 0)) if param.trained]
        for d in range(layout.dp):
            own = [zero_rows(param, layout.dp, d) for param in params]
            rows = [param.rows - (stop - start) for param, (start, stop) in zip(params, own, strict=True)]
            sizes = (param.row_size * count for param, count in zip(params, rows, strict=True))
            lacks[p, d] = itemsize * sum(sizes)
    return {placement.rank_of(c): lacks[c.p, c.d] for c in layout.coords()}


def check_shares(option: str, replicas: int, processes: int) -> None:
    """UserError naming the `option` that asks for a plan out of ZeRO shards with more than MOST_SHARES."""
    if replicas > 1 and replicas * processes > MOST_SHARES:
        raise UserError(
            f"{option}: {replicas} replicas to {processes} processes; replicas x processes"
            f" are at most {MOST_SHARES}, since all get rows of each"
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
    nest: bool = False,
    zero: bool = False,
) -> SwitchPlan:
    """How `spec`'s weights get from `source` to the layout and the ranks of `destination`.

    `planned` chooses anew which of these ranks plays which coordinate (and with `nest`, the stages: borders
    on those of the source); `fixed-order` keeps `destination` as it is and moves storage by storage;
    `gather-all` does too and gives every rank every whole storage, to take its rows from. `zero`: of source
    replicas, each has no more than its ZeRO-1 rows; what is aliased goes to its place in the source storages.
    `itemsize` is bytes per element; `staging_bytes` is explained at `switch_route.assign_buckets`.
    UserError for layouts that the model cannot have and for too little staging memory.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"no switch strategy {strategy!r}; use one of {', '.join(STRATEGIES)}")
    source.layout.check(spec)
    if nest:
        old = destination.layout
        destination = replace(destination, layout=Layout.nested(old.tp, old.pp, old.dp, source.layout))
    destination.layout.check(spec)
    zero = zero and source.layout.dp > 1
    rows = Rows(spec, source.layout, destination.layout, itemsize, zero)
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
        buckets = assign_buckets(remote, staging_bytes // 2)
    else:
        remote["bucket"] = remote["unit"]
        buckets = len(tuple(rows.units()))
    remote.setflags(write=False)
    local.setflags(write=False)
    fields = (spec, source, roles.placement, cluster, strategy, itemsize, zero)
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
