"""Layouts (how a model is cut), coordinates, and placements (which rank plays which coordinate)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.spec.model import ModelSpec
from puzzle.spec.tensors import Place

GroupKind = Literal["tp", "dp", "pp"]


class Coord(NamedTuple):
    """Tensor rank, pipeline stage and replica of one process."""

    t: int
    p: int
    d: int


@dataclass(frozen=True)
class Layout:
    """Tensor x pipeline x data parallelism; `stage_layers[p]` is the number of decoder layers of stage p."""

    tp: int
    pp: int
    dp: int
    stage_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise UserError if the numbers cannot be a layout of any model."""
        for name, value in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)):
            if value < 1:
                raise UserError(f"layout.{name} is {value}; it must be at least 1")
        if self.world > MOST_PROCESSES:
            raise UserError(
                f"layout {self} is {self.world} processes; at most {MOST_PROCESSES} are planned for"
            )
        if len(self.stage_layers) != self.pp or min(self.stage_layers) < 1:
            found = ",".join(map(str, self.stage_layers))
            raise UserError(f"layout.stage_layers {found}: give pp={self.pp} numbers, each at least 1")

    @classmethod
    def even(cls, tp: int, pp: int, dp: int, layers: int) -> Layout:
        """Layers spread evenly, the remainder over the first stages."""
        _enough_layers(pp, layers)
        return cls(tp, pp, dp, tuple(layers // pp + (p < layers % pp) for p in range(pp)))

    @classmethod
    def balanced(cls, tp: int, pp: int, dp: int, spec: ModelSpec) -> Layout:
        """Smallest largest stage by parameters, counting embedding, final norm and head at the ends."""
        _enough_layers(pp, spec.num_layers)
        sizes: dict[Place, int] = {"embed": 0, "head": 0, "tied": 0, 0: 0}
        for tensor in spec.tensors():
            if tensor.place in sizes:
                sizes[tensor.place] += tensor.size
        load = [sizes[0]] * pp
        load[0] += sizes["embed"] + sizes["tied"]
        load[-1] += sizes["head"] + (sizes["tied"] if pp > 1 else 0)
        stages = [1] * pp
        # Giving each further layer to the lightest stage is optimal because layers are all alike.
        for _ in range(spec.num_layers - pp):
            lightest = load.index(min(load))
            stages[lightest] += 1
            load[lightest] += sizes[0]
        return cls(tp, pp, dp, tuple(stages))

    @classmethod
    def nested(cls, tp: int, pp: int, dp: int, inside: Layout) -> Layout:
        """Stages whose borders are borders of `inside`'s stages, or split those, as evenly as that allows."""
        _enough_layers(pp, sum(inside.stage_layers))
        if pp <= inside.pp:
            return cls(tp, pp, dp, _merge(inside.stage_layers, pp))
        parts = [1] * inside.pp
        for _ in range(pp - inside.pp):
            heaviest = max(range(inside.pp), key=lambda p: -(-inside.stage_layers[p] // parts[p]))
            parts[heaviest] += 1
        split = [
            layers // part + (i < layers % part)
            for layers, part in zip(inside.stage_layers, parts, strict=True)
            for i in range(part)
        ]
        return cls(tp, pp, dp, tuple(split))

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    @cached_property
    def first_layers(self) -> tuple[int, ...]:
        """First layer of every stage, and the number of layers at the end."""
        starts = [0]
        for layers in self.stage_layers:
            starts.append(starts[-1] + layers)
        return tuple(starts)

    def layers(self, p: int) -> range:
        """The layers of stage p."""
        return range(self.first_layers[p], self.first_layers[p + 1])

    def stage_of(self, layer: int) -> int:
        """The stage that holds a layer."""
        return bisect_right(self.first_layers, layer) - 1

    def index(self, coord: Coord) -> int:
        """Position of a coordinate in the default order."""
        return coord.p * self.dp * self.tp + coord.d * self.tp + coord.t

    def coord(self, index: int) -> Coord:
        """Coordinate at a position of the default order."""
        rest, t = divmod(index, self.tp)
        p, d = divmod(rest, self.dp)
        return Coord(t, p, d)

    def coords(self) -> Iterator[Coord]:
        """All coordinates in the default order."""
        return (self.coord(index) for index in range(self.world))

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError, saying which number to change, if `spec` cannot be cut this way."""
        if sum(self.stage_layers) != spec.num_layers:
            found = sum(self.stage_layers)
            raise UserError(
                f"layout.stage_layers adds up to {found} layers, the model has {spec.num_layers}: change it"
            )
        heads, kv, blocks = spec.num_heads, spec.num_kv_heads, spec.ffn_blocks
        legal = [n for n in range(1, heads + 1) if _tp_fits(n, spec)]
        choices = ", ".join(map(str, legal))
        if heads % self.tp:
            raise UserError(f"layout.tp={self.tp} does not divide {heads} query heads; use one of {choices}")
        if self.tp % kv and kv % self.tp:
            raise UserError(
                f"layout.tp={self.tp} and {kv} key/value heads: one must divide the other;"
                f" use one of {choices}"
            )
        if blocks % self.tp:
            raise UserError(
                f"layout.tp={self.tp} does not divide {blocks} ffn blocks (common to {heads} heads and"
                f" {spec.intermediate_size} ffn rows); use one of {choices}"
            )

    def __str__(self) -> str:
        """tp,pp,dp."""
        return f"{self.tp},{self.pp},{self.dp}"


@dataclass(frozen=True)
class Placement:
    """A layout and the global rank that plays each coordinate, in the order of `Layout.index`."""

    layout: Layout
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise UserError unless every coordinate has a rank of its own."""
        if len(self.ranks) != self.layout.world or len(set(self.ranks)) != len(self.ranks):
            found = len(set(self.ranks))
            raise UserError(
                f"layout {self.layout} needs {self.layout.world} different ranks, {found} given;"
                " change layout.tp, layout.pp or layout.dp"
            )

    @classmethod
    def default(cls, layout: Layout, first: int = 0) -> Placement:
        """Ranks in the order p, d, t, counted from `first`."""
        return cls(layout, tuple(range(first, first + layout.world)))

    @cached_property
    def _index_of(self) -> dict[int, int]:
        return {rank: index for index, rank in enumerate(self.ranks)}

    def __contains__(self, rank: int) -> bool:
        """Whether the rank plays a coordinate."""
        return rank in self._index_of

    def rank_of(self, coord: Coord) -> int:
        """Global rank of a coordinate."""
        return self.ranks[self.layout.index(coord)]

    def coord_of(self, rank: int) -> Coord:
        """Coordinate of a global rank; KeyError if it plays none."""
        return self.layout.coord(self._index_of[rank])

    def tp_group(self, coord: Coord) -> tuple[int, ...]:
        """Ranks that differ from `coord` in t alone, by t."""
        return tuple(self.rank_of(coord._replace(t=t)) for t in range(self.layout.tp))

    def dp_group(self, coord: Coord) -> tuple[int, ...]:
        """Ranks that differ from `coord` in d alone, by d."""
        return tuple(self.rank_of(coord._replace(d=d)) for d in range(self.layout.dp))

    def pp_group(self, coord: Coord) -> tuple[int, ...]:
        """Ranks of the pipeline through `coord`, by stage."""
        return tuple(self.rank_of(coord._replace(p=p)) for p in range(self.layout.pp))

    def groups(self, kind: GroupKind) -> tuple[tuple[int, ...], ...]:
        """All groups of a kind, each once, in the same order on every rank."""
        of: dict[GroupKind, Callable[[Coord], tuple[int, ...]]] = {
            "tp": self.tp_group,
            "dp": self.dp_group,
            "pp": self.pp_group,
        }
        return tuple(dict.fromkeys(of[kind](coord) for coord in self.layout.coords()))


def _tp_fits(tp: int, spec: ModelSpec) -> bool:
    kv = spec.num_kv_heads
    return spec.num_heads % tp == 0 and spec.ffn_blocks % tp == 0 and (tp % kv == 0 or kv % tp == 0)


def _enough_layers(pp: int, layers: int) -> None:
    if pp < 1:
        raise UserError(f"layout.pp is {pp}; it must be at least 1")
    if pp > layers:
        raise UserError(f"layout.pp={pp} is more than the model's {layers} layers; use at most {layers}")


def _merge(stages: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Join neighbouring stages into `parts`: smallest largest sum, the others alike where that is free."""
    count = len(stages)
    sums = [sum(stages[:end]) for end in range(count + 1)]
    # best[end]: (largest sum, sum of squares, sums) for the first `end` stages in as many parts as the round.
    best: list[tuple[int, int, tuple[int, ...]] | None] = [(0, 0, ())] + [None] * count
    for _ in range(parts):
        row: list[tuple[int, int, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            options = []
            for start in range(end):
                before = best[start]
                if before is not None:
                    size = sums[end] - sums[start]
                    options.append((max(before[0], size), before[1] + size * size, (*before[2], size)))
            # Among equals the larger sums come first, as in an even layout.
            row[end] = min(options, key=lambda o: (o[0], o[1], [-n for n in o[2]]), default=None)
        best = row
    chosen = best[count]
    assert chosen is not None  # parts <= len(stages)
    return chosen[2]
