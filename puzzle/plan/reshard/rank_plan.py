"""One rank's part of a switch plan: row ranges of named storages instead of records of the whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from puzzle.plan.layout import Coord, Layout
from puzzle.plan.reshard.overlap import Unit
from puzzle.plan.reshard.routing import Records
from puzzle.plan.shards import LocalParam, local_params
from puzzle.spec.model import ModelSpec

if TYPE_CHECKING:
    from puzzle.plan.reshard.plan import SwitchPlan


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


class Pull(NamedTuple):
    """Rows of a storage of `peer` that become rows of a storage of this rank."""

    peer: int
    source: RowRange
    destination: RowRange
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
    no piece covers must be zero); `copies` fill these from source storages, and so do `buckets` of messages
    or, of a plan for peer copies, `pulls`, which out of ZeRO shards fill aliases, too. `peak_extra` in bytes.
    """

    rank: int
    aliases: tuple[Move, ...]
    allocate: tuple[LocalParam, ...]
    copies: tuple[Move, ...]
    buckets: tuple[Bucket, ...]
    pulls: tuple[Pull, ...]
    peak_extra: int


class Storages:
    """The storages of a layout's coordinates by name, made once for all replicas of one."""

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self.spec, self.layout = spec, layout
        self._made: dict[tuple[int, int], dict[str, LocalParam]] = {}

    def of(self, coord: Coord) -> dict[str, LocalParam]:
        """Those of one coordinate."""
        if (place := coord[:2]) not in self._made:
            params = local_params(self.spec, self.layout, coord)
            self._made[place] = {param.name: param for param in params}
        return self._made[place]


class RankPart:
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
            source = self._aliased(unit, param.rows)
            if source is not None:
                aliases.append(Move(source, RowRange(param.name, 0, param.rows)))
            else:
                allocate.append(param)
                extra += param.rows * unit.kind.row_bytes
                copies += [] if self.gathers else moves
        buckets, staging = ((), 0) if self.whole.transport == "peer" else self._buckets()
        pulls = self._pulls() if self.whole.transport == "peer" else ()
        extra += staging + (self.whole.scratch_bytes if self.gets else 0)
        return RankPlan(self.rank, tuple(aliases), tuple(allocate), tuple(copies), buckets, pulls, extra)

    def _destination(self) -> Iterable[tuple[int, LocalParam]]:
        if self.gets is None:
            return []
        by_name, p = self.whole.storages.of(self.gets), self.gets.p
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

    def _aliased(self, unit: Unit, rows: int) -> RowRange | None:
        """The range of a source storage that can be the destination storage, padding included."""
        assert self.gets is not None
        if self.gathers or self.had is None or self.had.p not in unit.source:
            return None
        offset = unit.kind.offsets[self.gets.t].get(self.had.t)
        return None if offset is None else RowRange(unit.source[self.had.p], offset, rows)

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

    def _pulls(self) -> tuple[Pull, ...]:
        """What the rank reads from others, of each peer by unit; one comes from every peer in turn.

        Every rank begins with its next neighbour, so that no peer is read by all at once.
        """
        if self.gets is None:
            return ()
        remote, world, whole = self.whole.remote, self.whole.ranks[-1] + 1, self.whole
        turns: defaultdict[int, int] = defaultdict(int)
        found = []
        fields = ["unit", "source", "source_start", "destination_start", "rows", "nbytes"]
        for unit, peer, start, to, rows, nbytes in remote[remote["destination"] == self.rank][
            fields
        ].tolist():
            names, stage = whole.units[unit], whole.source.coord_of(peer).p
            source = RowRange(names.source[stage], start, rows)
            pull = Pull(peer, source, RowRange(names.destination[self.gets.p], to, rows), nbytes)
            found.append((turns[peer], (peer - self.rank) % world, pull))
            turns[peer] += 1
        return tuple(pull for *_, pull in sorted(found))

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
