"""Which box of which logical tensor lies where: local parameters, their holders, their cuts.

The split dimension of every tensor is the first of its storage (row-parallel matrices are stored transposed),
so a shard is always a range of whole rows, contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.spec.lora import adapter_names
from puzzle.spec.model import ModelSpec
from puzzle.spec.tensors import TensorSpec, VocabSplit


@dataclass(frozen=True)
class Box:
    """One half-open interval per dimension of a logical tensor."""

    intervals: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent per dimension."""
        return tuple(stop - start for start, stop in self.intervals)

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for start, stop in self.intervals:
            count *= stop - start
        return count

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in an array of the logical tensor."""
        return tuple(slice(start, stop) for start, stop in self.intervals)

    def cut(self, dim: int, start: int, stop: int) -> Box:
        """The box with dimension `dim` replaced by [start, stop)."""
        return Box((*self.intervals[:dim], (start, stop), *self.intervals[dim + 1 :]))

    def intersect(self, other: Box) -> Box | None:
        """What both boxes cover; None where that is nothing."""
        both = []
        for (a, b), (c, d) in zip(self.intervals, other.intervals, strict=True):
            start, stop = max(a, c), min(b, d)
            if start >= stop:
                return None
            both.append((start, stop))
        return Box(tuple(both))


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + rows) of a storage hold `box` of `tensor`; rows run along its dimension `dim`."""

    tensor: str
    box: Box
    start: int
    dim: int = 0

    @property
    def rows(self) -> int:
        """Number of storage rows."""
        start, stop = self.box.intervals[self.dim]
        return stop - start

    @property
    def stop(self) -> int:
        """End of the storage rows."""
        return self.start + self.rows


@dataclass(frozen=True)
class LocalParam:
    """One storage tensor of a coordinate; `transposed`: its rows are dimension 1 of the logical tensors.

    Rows that no piece covers are vocabulary padding. `trained` is what its tensors are.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False
    trained: bool = True

    @property
    def rows(self) -> int:
        """Extent of dimension 0."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements, padding included."""
        return self.shape[0] * self.row_size

    @property
    def row_size(self) -> int:
        """Elements of one row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def clip(self, start: int, stop: int) -> tuple[Piece, ...]:
        """The pieces inside storage rows [start, stop); their `start` still counts from storage row 0."""
        inside = []
        for piece in self.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                first = piece.box.intervals[piece.dim][0] - piece.start
                box = piece.box.cut(piece.dim, first + low, first + high)
                inside.append(Piece(piece.tensor, box, low, piece.dim))
        return tuple(inside)


def local_params(spec: ModelSpec, layout: Layout, coord: Coord) -> tuple[LocalParam, ...]:
    """The storages of one coordinate, in the order of the forward pass; equal for all d.

    Names: `embed`, `layers.N.attention_norm|qkv|qkv_bias|q_norm|k_norm|attention_out|attention_out_bias|
    mlp_norm|gate_up|gate_up_bias|down|down_bias` (N counts from the first layer), `final_norm`, `head`.
    A tied head on the only stage is `embed`; on a last stage of its own it is `head`, holding the same boxes.
    An adapted matrix `M` has `M_adapter.a`, the A of its tensors one above the other, and `M_adapter.b`, of
    which each row stands beside one of `M`.
    """
    cut = _Cut(spec, layout.tp, coord.t)
    params: list[LocalParam] = []
    if coord.p == 0:
        params.append(cut.matrix("embed", "model.embed_tokens.weight"))
    for layer in layout.layers(coord.p):
        params += cut.layer(layer)
    if coord.p == layout.pp - 1:
        params.append(cut.matrix("final_norm", "model.norm.weight"))
        if not (spec.tied and layout.pp == 1):
            params.append(cut.matrix("head", spec.head_tensor))
    return tuple(params)


def adapted(params: Iterable[LocalParam]) -> list[tuple[LocalParam, LocalParam]]:
    """Every storage that has an adapter, with the adapter's `b`."""
    named = {param.name: param for param in params}
    return [(param, named[b]) for name, param in named.items() if (b := f"{name}_adapter.b") in named]


def stages_of(tensor: TensorSpec, layout: Layout) -> tuple[int, ...]:
    """The pipeline stages that hold a tensor."""
    last = layout.pp - 1
    if isinstance(tensor.place, int):
        return (layout.stage_of(tensor.place),)
    return {"embed": (0,), "head": (last,), "tied": (0,) if last == 0 else (0, last)}[tensor.place]


def sharers(tensor: TensorSpec, layout: Layout, coord: Coord) -> tuple[Coord, ...]:
    """The coordinates of `coord`'s replica that hold the same boxes of `tensor`; the first is the owner.

    Gradients are summed over them; the owner alone counts the boxes in norms and writes them in checkpoints.
    """
    same = tensor.split.holders(layout.tp, coord.t) if tensor.split else range(layout.tp)
    return tuple(Coord(t, p, coord.d) for p in stages_of(tensor, layout) for t in same)


def sharer_groups(spec: ModelSpec, placement: Placement) -> tuple[tuple[int, ...], ...]:
    """Every set of two or more ranks that hold the same boxes of some trained tensor inside a replica,
    sorted."""
    # Tensors with one place and split have one answer, and all layers of a stage are alike.
    kinds = {(t.place, t.split): t for t in spec.tensors() if t.trained}
    found = {
        tuple(placement.rank_of(c) for c in sharers(tensor, placement.layout, coord))
        for tensor in kinds.values()
        for coord in placement.layout.coords()
    }
    return tuple(sorted(ranks for ranks in found if len(ranks) > 1))


def zero_rows(param: LocalParam, dp: int, d: int) -> tuple[int, int]:
    """Half-open storage rows that replica d updates under ZeRO-1: chunks of ceil(rows/dp), the last cut."""
    chunk = -(-param.rows // dp)
    return min(d * chunk, param.rows), min((d + 1) * chunk, param.rows)


class _Cut:
    """Builds the storages of one tensor rank."""

    def __init__(self, spec: ModelSpec, tp: int, t: int) -> None:
        self.spec, self.tp, self.t = spec, tp, t
        self.tensors: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in spec.tensors()}

    def interval(self, tensor: TensorSpec, dim: int) -> tuple[int, int]:
        if tensor.split is None or tensor.split.dim != dim:
            return 0, tensor.shape[dim]
        return tensor.split.interval(tensor.shape[dim], self.tp, self.t)

    def matrix(self, name: str, tensor_name: str) -> LocalParam:
        """A storage that holds one box of one tensor (a vector is a matrix of one dimension)."""
        tensor = self.tensors[tensor_name]
        box = Box(tuple(self.interval(tensor, dim) for dim in range(len(tensor.shape))))
        dim = tensor.split.dim if tensor.split else 0
        shape = (box.shape[dim], *(n for i, n in enumerate(box.shape) if i != dim))
        if tensor.place in ("embed", "tied") or tensor_name == "lm_head.weight":
            shape = (VocabSplit.chunk(tensor.shape[0], self.tp), *shape[1:])
        pieces = (Piece(tensor_name, box, 0, dim),) if box.size else ()
        return LocalParam(name, shape, pieces, transposed=dim == 1, trained=tensor.trained)

    def interleaved(self, name: str, tensor_names: list[str], blocks: int) -> LocalParam:
        """A storage of `blocks` blocks, each of which holds the same share of every tensor in turn."""
        pieces, start = [], 0
        for block in range(blocks):
            for tensor_name in tensor_names:
                tensor = self.tensors[tensor_name]
                low, high = self.interval(tensor, 0)
                rows = (high - low) // blocks
                box = Box(((low + block * rows, low + (block + 1) * rows), *_whole(tensor.shape[1:])))
                pieces.append(Piece(tensor_name, box, start))
                start += rows
        first = self.tensors[tensor_names[0]]
        return LocalParam(name, (start, *first.shape[1:]), tuple(pieces), trained=first.trained)

    def fused(self, name: str, matrices: list[str], blocks: int) -> Iterator[LocalParam]:
        """The interleaved storage of several matrices, and those of their adapters."""
        yield self.interleaved(name, matrices, blocks)
        pairs = [pair for pair in map(adapter_names, matrices) if pair[0] in self.tensors]
        if pairs:
            yield self.interleaved(f"{name}_adapter.a", [a for a, _ in pairs], 1)
            yield self.interleaved(f"{name}_adapter.b", [b for _, b in pairs], blocks)

    def single(self, name: str, matrix: str) -> Iterator[LocalParam]:
        """The storage of one matrix, and those of its adapter."""
        yield self.matrix(name, matrix)
        a, b = adapter_names(matrix)
        if a in self.tensors:
            yield self.matrix(f"{name}_adapter.a", a)
            yield self.matrix(f"{name}_adapter.b", b)

    def layer(self, layer: int) -> Iterator[LocalParam]:
        spec, ours, theirs = self.spec, f"layers.{layer}.", f"model.layers.{layer}."
        groups, blocks = max(1, spec.num_kv_heads // self.tp), spec.ffn_blocks // self.tp
        qkv = [f"{theirs}self_attn.{part}_proj." for part in "qkv"]
        gate_up = [f"{theirs}mlp.{part}_proj." for part in ("gate", "up")]
        yield self.matrix(ours + "attention_norm", theirs + "input_layernorm.weight")
        yield from self.fused(ours + "qkv", [part + "weight" for part in qkv], groups)
        if spec.qkv_bias:
            yield self.interleaved(ours + "qkv_bias", [part + "bias" for part in qkv], groups)
        if spec.qk_norm:
            yield self.matrix(ours + "q_norm", theirs + "self_attn.q_norm.weight")
            yield self.matrix(ours + "k_norm", theirs + "self_attn.k_norm.weight")
        yield from self.single(ours + "attention_out", theirs + "self_attn.o_proj.weight")
        if spec.out_bias:
            yield self.matrix(ours + "attention_out_bias", theirs + "self_attn.o_proj.bias")
        yield self.matrix(ours + "mlp_norm", theirs + "post_attention_layernorm.weight")
        yield from self.fused(ours + "gate_up", [part + "weight" for part in gate_up], blocks)
        if spec.mlp_bias:
            yield self.interleaved(ours + "gate_up_bias", [part + "bias" for part in gate_up], blocks)
        yield from self.single(ours + "down", theirs + "mlp.down_proj.weight")
        if spec.mlp_bias:
            yield self.matrix(ours + "down_bias", theirs + "mlp.down_proj.bias")


def _whole(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((0, extent) for extent in shape)
