"""Which rank plays which coordinate of a new layout, so that little moves, and along fast links.

A rank's cost in a role is the seconds that it takes to receive what it lacks: bytes that a rank of its node
has at the rate inside nodes, the others at the rate between nodes. It depends on rank and role alone, so the
best mapping is an assignment problem: first the smallest largest cost, then the fewest bytes. Tensor-parallel
groups lie inside nodes, which couples the choices: an integer program decides how many groups of each stage
go to each node, and an assignment decides who plays what there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puzzle.plan.cluster import GB, Cluster
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.reshard.overlap import Fragment, Rows, Unit

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

# scipy's solvers are imported where they solve: most runs choose no roles, and every process would load them.
Bytes = NDArray[np.int64]
TIME_LIMIT = 20.0  # seconds for one solution of the integer program


@dataclass(frozen=True)
class RoleCosts:
    """What each rank (row, in ascending order) would lack in each role (column `p*tp + t`; all d are alike).

    `needed` (roles) and `local` (ranks, roles) in bytes; `seconds` (ranks, roles) to receive the difference;
    `bare_seconds` those of a rank of the same node that has nothing itself.
    """

    ranks: tuple[int, ...]
    needed: Bytes
    local: Bytes
    seconds: NDArray[np.float64]
    bare_seconds: NDArray[np.float64]

    @property
    def missing(self) -> Bytes:
        """Bytes that each rank would receive in each role."""
        return self.needed[None, :] - self.local

    def of(self, placement: Placement) -> tuple[float, int]:
        """Largest seconds of a rank and bytes of all ranks under a placement on these ranks."""
        layout, row = placement.layout, {rank: i for i, rank in enumerate(self.ranks)}
        cells = [(row[placement.rank_of(c)], c.p * layout.tp + c.t) for c in layout.coords()]
        missing = self.missing
        return max(float(self.seconds[cell]) for cell in cells), sum(int(missing[cell]) for cell in cells)


class Roles(NamedTuple):
    """A placement, whether it is proven best, and whether tensor-parallel groups lie inside nodes (or, being
    larger, fill neighbouring ones)."""

    placement: Placement
    exact: bool
    inside_nodes: bool


def role_costs(rows: Rows, source: Placement, ranks: tuple[int, ...], cluster: Cluster) -> RoleCosts:
    """What each of `ranks` lacks of each role of `rows.destination`."""
    nodes = sorted({cluster.node_of(rank) for rank in ranks})
    parties = [[rank] for rank in ranks]
    parties += [[rank for rank in source.ranks if cluster.node_of(rank) == node] for node in nodes]
    held = _held(rows, source, parties)
    local, near = held[: len(ranks)], held[len(ranks) :]
    near = near[[nodes.index(cluster.node_of(rank)) for rank in ranks]]
    needed = _held(rows, source, [list(source.ranks)])[0]

    def seconds(have: Bytes) -> NDArray[np.float64]:
        # On one denominator, so that equal costs are equal numbers.
        work = (near - have) * cluster.inter_gbs + (needed[None, :] - near) * cluster.intra_gbs
        return work / (cluster.intra_gbs * cluster.inter_gbs * GB)

    return RoleCosts(ranks, needed, local, seconds(local), seconds(np.zeros_like(local)))


def _held(rows: Rows, source: Placement, parties: list[list[int]]) -> Bytes:
    """Bytes of each role that some member of each party holds in the source placement: (parties, roles)."""
    layout, destination = source.layout, rows.destination
    present = np.zeros((len(parties), layout.pp, rows.holders), dtype=bool)
    for i, party in enumerate(parties):
        for rank in party:
            if rank in source:
                coord = source.coord_of(rank)
                present[i, coord.p, rows.holder(coord)] = True
    common = np.array(
        [
            [len(_common(layout.layers(p), destination.layers(q))) for q in range(destination.pp)]
            for p in range(layout.pp)
        ]
    )
    total = np.zeros((len(parties), destination.pp, destination.tp), dtype=np.int64)
    for t in range(destination.tp):
        share = sum(_bytes_held(present, kind.fragments[t], kind.row_bytes) for kind in rows.layer_kinds)
        total[:, :, t] += share @ common
        for unit in rows.end_units:
            here = _end_present(present, unit)
            share = _bytes_held(here, unit.kind.fragments[t], unit.kind.row_bytes)
            for stage in unit.destination:
                total[:, stage, t] += share
    return total.reshape(len(parties), -1)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _end_present(present: NDArray[np.bool_], unit: Unit) -> NDArray[np.bool_]:
    """(parties, holders): whether a party has a holder's shard of an end unit on any of its stages."""
    return np.any(present[:, list(unit.source)], axis=1)


def _bytes_held(present: NDArray[np.bool_], fragments: tuple[Fragment, ...], row_bytes: int) -> Bytes:
    """Bytes of the fragments of which a holder is present; `present` (..., holders) gives (...)."""
    mask = np.zeros((present.shape[-1], len(fragments)), dtype=np.int64)
    for i, fragment in enumerate(fragments):
        mask[list(fragment.holders), i] = 1
    size = np.array([fragment.rows * row_bytes for fragment in fragments], dtype=np.int64)
    return ((present.astype(np.int64) @ mask) > 0) @ size


def choose_roles(costs: RoleCosts, layout: Layout, cluster: Cluster) -> Roles:
    """The best placement of `layout` on `costs.ranks`; not `exact` if the program took over TIME_LIMIT."""
    cells = _cells(costs.ranks, layout.tp, cluster)
    if cells is None or layout.tp == 1 or len(cells) == 1:
        counts = np.full((layout.pp, 1), layout.dp)
        everyone = [np.arange(len(costs.ranks))]
        bound = _bottleneck(costs.seconds, lambda limit: _matches(costs.seconds <= limit, layout.dp))
        return Roles(_seat(costs, layout, everyone, counts, bound), True, cells is not None)
    low = _bottleneck(costs.seconds, lambda limit: _matches(costs.seconds <= limit, layout.dp))
    nodes = np.array([cluster.node_of(rank) for rank in costs.ranks])
    program = _Program(costs, layout, cells, nodes)
    bound = _bottleneck(costs.seconds[costs.seconds >= low], lambda limit: program.solve(limit) is not None)
    counts = program.solve(bound)
    assert counts is not None  # the bound is feasible
    return Roles(_seat(costs, layout, cells, counts, bound), program.exact, True)


def _cells(ranks: tuple[int, ...], tp: int, cluster: Cluster) -> list[NDArray[np.int64]] | None:
    """Rows of the ranks of each node (or of as many neighbouring nodes as one group fills); None where groups
    do not fit."""
    nodes_each = -(-tp // cluster.devices_per_node)
    cell_of = np.array([cluster.node_of(rank) // nodes_each for rank in ranks])
    cells = [np.flatnonzero(cell_of == cell) for cell in np.unique(cell_of)]
    return cells if all(len(cell) % tp == 0 for cell in cells) else None


def _bottleneck(seconds: NDArray[np.float64], feasible: Callable[[float], bool]) -> float:
    """The smallest of the values for which `feasible` holds, given that it does for the largest."""
    values = np.unique(seconds)
    low, high = 0, len(values) - 1
    if feasible(float(values[0])):  # often nobody needs to be worse off than the luckiest
        return float(values[0])
    while low < high:
        middle = (low + high) // 2
        if feasible(float(values[middle])):
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _matches(allowed: NDArray[np.bool_], copies: int) -> bool:
    """Whether every rank (row) can play an allowed role (column), each role `copies` times."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    matched = maximum_bipartite_matching(csr_array(np.repeat(allowed, copies, axis=1)))
    return bool((matched >= 0).all())


def _seat(
    costs: RoleCosts, layout: Layout, cells: list[NDArray[np.int64]], counts: NDArray[np.int64], bound: float
) -> Placement:
    """Within every cell, the assignment with the fewest bytes whose ranks all stay within `bound`.

    `counts` (stages, cells): how many tensor-parallel groups of each stage go to each cell.
    """
    from scipy.optimize import linear_sum_assignment

    ranks = [0] * layout.world
    replica = [0] * layout.pp
    for cell, members in enumerate(cells):
        coords = []
        for p in range(layout.pp):
            for _ in range(counts[p, cell]):
                coords += [Coord(t, p, replica[p]) for t in range(layout.tp)]
                replica[p] += 1
        columns = [coord.p * layout.tp + coord.t for coord in coords]
        missing = costs.missing[np.ix_(members, columns)].astype(np.float64)
        missing[costs.seconds[np.ix_(members, columns)] > bound] = np.inf
        for row, column in zip(*linear_sum_assignment(missing), strict=True):
            ranks[layout.index(coords[column])] = costs.ranks[members[row]]
    return Placement(layout, tuple(ranks))


class _Program:
    """How many groups of each stage go to each cell: the integer program.

    Variables: 0 or 1 for every pair of a rank and a role of which the rank has something; how many of each
    node's other ranks play each role; how many groups of each stage are in each cell. The last are declared
    integer: what remains once they are fixed is a network flow, whose corners are whole.
    """

    def __init__(
        self, costs: RoleCosts, layout: Layout, cells: list[NDArray[np.int64]], nodes: NDArray[np.int64]
    ) -> None:
        self.costs, self.shape, self.exact = costs, (layout.pp, len(cells)), True
        self._solved: dict[float, NDArray[np.int64] | None] = {}
        roles = layout.tp * layout.pp
        # The ranks of a node cost the same in a role of which they have nothing; one of them stands for all.
        self.rank, self.role = np.nonzero(costs.local)
        self.first_of_node, node_of_rank = np.unique(nodes, return_index=True, return_inverse=True)[1:]
        pairs, pooled = len(self.rank), len(self.first_of_node) * roles
        cell_of_rank = np.empty(len(costs.ranks), np.int64)
        for cell, members in enumerate(cells):
            cell_of_rank[members] = cell
        x = np.arange(pairs)
        u = pairs + np.arange(pooled).reshape(-1, roles)
        y = pairs + pooled + np.arange(layout.pp * len(cells)).reshape(self.shape)
        seats = np.arange(len(cells) * roles).reshape(len(cells), roles)
        entries = _Entries(y[-1, -1] + 1)
        entries.block(self.rank, x, 1.0, len(costs.ranks), low=0.0, high=1.0)
        at_node = np.repeat(np.arange(len(self.first_of_node)), roles)
        row, column = np.r_[node_of_rank[self.rank], at_node], np.r_[x, u.ravel()]
        sizes = np.bincount(node_of_rank).astype(float)
        entries.block(row, column, 1.0, len(sizes), low=sizes, high=sizes)
        taken = seats[cell_of_rank[self.rank], self.role]
        pool_seats = seats[cell_of_rank[self.first_of_node]].ravel()
        given = np.repeat(y.T, layout.tp, axis=1).ravel()
        row, column = np.r_[taken, pool_seats, seats.ravel()], np.r_[x, u.ravel(), given]
        factor = np.r_[np.ones(pairs + pooled), -np.ones(seats.size)]
        entries.block(row, column, factor, seats.size, low=0.0, high=0.0)
        stage = np.repeat(np.arange(layout.pp), len(cells))
        entries.block(stage, y.ravel(), 1.0, layout.pp, low=layout.dp, high=layout.dp)
        self.constraints = entries.constraint()
        self.integrality = np.r_[np.zeros(pairs + pooled), np.ones(y.size)]

    def solve(self, bound: float) -> NDArray[np.int64] | None:
        """Counts with the fewest bytes where no rank takes more than `bound` seconds; None if impossible."""
        if bound not in self._solved:
            self._solved[bound] = self._solve(bound)
        return self._solved[bound]

    def _solve(self, bound: float) -> NDArray[np.int64] | None:
        costs, counts = self.costs, self.shape[0] * self.shape[1]
        kept = costs.local[self.rank, self.role]
        from scipy.optimize import Bounds, milp

        # Whole numbers as small as they can be keep the solver's tolerances far below one byte.
        scale = max(1, int(np.gcd.reduce(kept)) if len(kept) else 1)
        pairs = costs.seconds[self.rank, self.role] <= bound
        pooled = (costs.bare_seconds[self.first_of_node] <= bound).ravel()
        upper = np.r_[pairs.astype(float), np.where(pooled, np.inf, 0.0), np.full(counts, np.inf)]
        objective = np.r_[-kept / scale, np.zeros(len(pooled) + counts)]
        found = milp(
            objective,
            integrality=self.integrality,
            bounds=Bounds(0.0, upper),
            constraints=self.constraints,
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
        )
        self.exact &= found.status in (0, 2)  # solved, or proven to have no solution
        if found.x is None:
            return None
        return np.rint(found.x[-counts:]).astype(np.int64).reshape(self.shape)


class _Entries:
    """Collects blocks of rows of a sparse constraint matrix."""

    def __init__(self, columns: int) -> None:
        self.columns, self.rows = columns, 0
        self.parts: list[tuple[Bytes, Bytes, NDArray[np.float64]]] = []
        self.low: list[NDArray[np.float64]] = []
        self.high: list[NDArray[np.float64]] = []

    def block(
        self,
        row: Bytes,
        column: Bytes,
        factor: float | NDArray[np.float64],
        rows: int,
        *,
        low: float | NDArray[np.float64],
        high: float | NDArray[np.float64],
    ) -> None:
        self.parts.append((row + self.rows, column, np.broadcast_to(factor, len(row))))
        self.low.append(np.broadcast_to(low, rows))
        self.high.append(np.broadcast_to(high, rows))
        self.rows += rows

    def constraint(self) -> LinearConstraint:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array

        row, column, factor = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        matrix = coo_array((factor, (row, column)), (self.rows, self.columns)).tocsc()
        return LinearConstraint(matrix, np.concatenate(self.low), np.concatenate(self.high))
