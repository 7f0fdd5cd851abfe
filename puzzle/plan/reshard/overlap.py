"""How the storages of two tensor-parallel sizes overlap, row by row.

The rows of a storage under tp = 1 number the rows of all its shards: under any tp, a rank's storage is one or
two ranges of them. Storages of one kind (say, qkv of every layer) overlap alike: one table serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from puzzle.plan.layout import Coord, Layout
from puzzle.plan.shards import LocalParam, local_params, zero_rows
from puzzle.spec.model import ModelSpec


class Interval(NamedTuple):
    """Rows [start, stop) of the whole storage, found at row `at` of a shard."""

    start: int
    stop: int
    at: int


class Fragment(NamedTuple):
    """Rows that belong at row `start` of a destination shard; holder h (`Rows.holder`) has them at row
    `holders[h]` of its storage."""

    start: int
    rows: int
    holders: dict[int, int]


@dataclass(frozen=True)
class Kind:
    """Storages of one shape and cut: one per layer, or one of the ends of the model.

    `shape` is that of the whole storage; `spans[t]` and `fragments[t]` describe the shard of destination
    tensor rank t, `whole` all rows. `offsets[t]`: source tensor ranks whose storage has the whole shard t,
    padding included, as one range of rows, and the first of them.
    """

    name: str
    shape: tuple[int, ...]
    row_bytes: int
    spans: tuple[tuple[Interval, ...], ...]
    fragments: tuple[tuple[Fragment, ...], ...]
    whole: tuple[Fragment, ...]
    offsets: tuple[dict[int, int], ...]


class Unit(NamedTuple):
    """One storage of the model: its kind, and by stage the name that it has in the two layouts."""

    kind: Kind
    name: str
    layer: int | None
    source: dict[int, str]
    destination: dict[int, str]


@dataclass(frozen=True)
class Rows:
    """The overlap of two layouts of a model; `itemsize` is the bytes of one element.

    With `zero`, a source rank holds no more of its storages than its replica's rows under ZeRO-1. Who may
    hold rows has a number: the tensor rank t, alike in all replicas, or with `zero` t * dp + d.
    """

    spec: ModelSpec
    source: Layout
    destination: Layout
    itemsize: int
    zero: bool = False

    @property
    def holders(self) -> int:
        """How many numbers of holders there are."""
        return self.source.tp * (self.source.dp if self.zero else 1)

    def holder(self, coord: Coord) -> int:
        """The number of a source coordinate."""
        return coord.t * self.source.dp + coord.d if self.zero else coord.t

    def coords(self, holder: int, p: int) -> list[Coord]:
        """The coordinates of stage p that have this number."""
        if self.zero:
            t, d = divmod(holder, self.source.dp)
            return [Coord(t, p, d)]
        return [Coord(holder, p, d) for d in range(self.source.dp)]

    @cached_property
    def layer_kinds(self) -> tuple[Kind, ...]:
        """The kinds that every layer has, in forward order."""
        return tuple(kind for name, kind in self._kinds.items() if name not in self._ends)

    @cached_property
    def end_units(self) -> tuple[Unit, ...]:
        """Embedding, final norm and (untied) head."""
        return tuple(
            Unit(
                self._kinds[name],
                name,
                None,
                self._stages(name, self.source),
                self._stages(name, self.destination),
            )
            for name in self._ends
        )

    def units(self) -> Iterator[Unit]:
        """Every storage of the model, in forward order."""
        yield from self.end_units[:1]
        for layer in range(self.spec.num_layers):
            source, destination = self.source.stage_of(layer), self.destination.stage_of(layer)
            for kind in self.layer_kinds:
                name = f"layers.{layer}.{kind.name}"
                yield Unit(kind, name, layer, {source: name}, {destination: name})
        yield from self.end_units[1:]

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return ("embed", "final_norm") if self.spec.tied else ("embed", "final_norm", "head")

    def _stages(self, name: str, layout: Layout) -> dict[int, str]:
        last = layout.pp - 1
        if name != "embed":
            return {last: name}
        return {0: "embed", last: "head"} if self.spec.tied and last else {0: "embed"}

    @cached_property
    def _kinds(self) -> dict[str, Kind]:
        # One layer stands for all of them.
        spec = replace(self.spec, num_layers=1)
        whole = _shard(spec, 1, 0)
        sources = [_shard(spec, self.source.tp, t) for t in range(self.source.tp)]
        holders = [self.coords(number, 0)[0] for number in range(self.holders)]
        destinations = [_shard(spec, self.destination.tp, t) for t in range(self.destination.tp)]
        kinds = {}
        for name, param in whole.items():
            have = [_spans(param, shard[name]) for shard in sources]
            need = tuple(_spans(param, shard[name]) for shard in destinations)
            room = sources[0][name].rows - destinations[0][name].rows
            offsets = tuple(_offsets(_fragments(have, spans), room) for spans in need)
            if self.zero:
                cut = (_own_rows(sources[c.t][name], self.source.dp, c.d) for c in holders)
                have = [_spans(param, shard) for shard in cut]
            kinds[name] = Kind(
                name,
                param.shape,
                param.row_size * self.itemsize,
                need,
                tuple(_fragments(have, spans) for spans in need),
                _fragments(have, (Interval(0, param.rows, 0),)),
                offsets,
            )
        return kinds


def _shard(spec: ModelSpec, tp: int, t: int) -> dict[str, LocalParam]:
    """The storages of a one-layer model by name, without the layer's number."""
    params = local_params(spec, Layout(tp, 1, 1, (1,)), Coord(t, 0, 0))
    return {param.name.removeprefix("layers.0."): param for param in params}


def _own_rows(param: LocalParam, dp: int, d: int) -> LocalParam:
    """The storage with no more pieces than those of replica d's rows."""
    return replace(param, pieces=param.clip(*zero_rows(param, dp, d)))


def _offsets(fragments: tuple[Fragment, ...], room: int) -> dict[int, int]:
    """Holders of all fragments in one range, and its first row; `room`: rows that they have beyond those."""
    found = {}
    for holder in fragments[0].holders if fragments else ():
        offsets = {f.holders[holder] - f.start if holder in f.holders else -1 for f in fragments}
        offset = offsets.pop()
        if not offsets and 0 <= offset <= room:
            found[holder] = offset
    return found


def _spans(whole: LocalParam, shard: LocalParam) -> tuple[Interval, ...]:
    """Where the rows of a shard lie in the whole storage, neighbouring rows joined."""
    spans: list[Interval] = []
    for piece in shard.pieces:
        low, high = piece.box.intervals[piece.dim]
        for candidate in whole.pieces:
            first, end = candidate.box.intervals[candidate.dim]
            if candidate.tensor == piece.tensor and first <= low and high <= end:
                start = candidate.start + low - first
                break
        else:
            raise ValueError(f"{shard.name}: {piece} lies across blocks")
        if spans and spans[-1].stop == start and spans[-1].at + start - spans[-1].start == piece.start:
            spans[-1] = spans[-1]._replace(stop=start + piece.rows)
        else:
            spans.append(Interval(start, start + piece.rows, piece.start))
    return tuple(spans)


def _fragments(have: list[tuple[Interval, ...]], need: tuple[Interval, ...]) -> tuple[Fragment, ...]:
    """Cut `need` so that every source rank holds all of a fragment or nothing of it."""
    # Together they hold all rows: a span ends where another one starts, or where rows end.
    borders = sorted({span.start for spans in have for span in spans})
    found: list[Fragment] = []
    for start, stop, at in need:
        cuts = [start, *(border for border in borders if start < border < stop), stop]
        for low, high in pairwise(cuts):
            holders = {
                t: span.at + low - span.start
                for t, spans in enumerate(have)
                for span in spans
                if span.start <= low and high <= span.stop
            }
            found.append(Fragment(at + low - start, high - low, holders))
    return tuple(found)
