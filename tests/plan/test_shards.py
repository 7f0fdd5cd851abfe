from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.shards import (
    Box,
    local_params,
    sharers,
    stages_of,
    zero_rows,
)
from puzzle.spec.model import ModelSpec
from tests.plan.worlds import layouts, legal_tps, numbered, specs, storages, stored


def boxes(spec: ModelSpec, layout: Layout, coord: Coord) -> list[tuple[str, Box]]:
    return [
        (piece.tensor, piece.box) for param in local_params(spec, layout, coord) for piece in param.pieces
    ]


def holders(spec: ModelSpec, placement: Placement, d: int) -> dict[tuple[str, Box], list[int]]:
    """The ranks of replica `d` that store each box of each tensor."""
    stored_by: dict[tuple[str, Box], list[int]] = {}
    for coord in placement.layout.coords():
        if coord.d == d:
            for held in boxes(spec, placement.layout, coord):
                stored_by.setdefault(held, []).append(placement.rank_of(coord))
    return stored_by


@given(st.data())
def test_boxes_of_a_replica_tile_every_tensor_once(data):
    spec = data.draw(specs())
    placement = Placement.default(data.draw(layouts(spec)))
    count = {tensor.name: np.zeros(tensor.shape, dtype=int) for tensor in spec.tensors()}
    for name, box in holders(spec, placement, d=placement.layout.dp - 1):
        count[name][box.slices] += 1
    assert all((seen == 1).all() for seen in count.values())


@given(st.data())
def test_sharers_are_the_ranks_that_store_the_box(data):
    spec = data.draw(specs())
    layout = data.draw(layouts(spec))
    ranks = tuple(data.draw(st.permutations(range(layout.world))))
    placement = Placement(layout, ranks)
    tensors = {tensor.name: tensor for tensor in spec.tensors()}
    d = data.draw(st.integers(0, layout.dp - 1))
    for (name, _), stores in holders(spec, placement, d).items():
        orders = {sharers(tensors[name], layout, placement.coord_of(rank)) for rank in stores}
        assert len(orders) == 1, "all agree who the owner is"
        assert sorted(placement.rank_of(coord) for coord in orders.pop()) == sorted(stores)


@given(st.data())
def test_storages_scattered_back_are_the_tensors(data):
    spec = data.draw(specs())
    layout = data.draw(layouts(spec))
    whole = numbered(spec)
    back = {name: np.zeros_like(array) for name, array in whole.items()}
    for coord in layout.coords():
        if coord.d:
            continue
        for param, storage in zip(
            local_params(spec, layout, coord), storages(spec, layout, coord).values(), strict=True
        ):
            assert storage.shape == param.shape
            covered = np.zeros(param.rows, dtype=int)
            for piece in param.pieces:
                rows = storage[piece.start : piece.stop]
                back[piece.tensor][piece.box.slices] = rows.T if piece.dim else rows
                covered[piece.start : piece.stop] += 1
            assert (covered == (storage.reshape(param.rows, -1)[:, 0] != 0)).all()
            assert covered.max() <= 1
            assert covered.all() or param.name in ("embed", "head")
    assert all((back[name] == whole[name]).all() for name in whole)


@given(st.data())
def test_a_larger_tp_takes_one_row_range_of_a_smaller_one(data):
    """Where key/value heads are not copied and no vocabulary rows are padded."""
    spec = data.draw(specs())
    spec = replace(spec, vocab_size=8 * spec.vocab_size)
    tps = [tp for tp in legal_tps(spec) if tp <= spec.num_kv_heads and spec.vocab_size % tp == 0]
    small = data.draw(st.sampled_from(tps))
    large = data.draw(st.sampled_from([tp for tp in tps if tp % small == 0]))
    layers = spec.num_layers
    for t in range(large):
        wide = storages(spec, Layout.even(small, 1, 1, layers), Coord(t * small // large, 0, 0))
        for name, rows in storages(spec, Layout.even(large, 1, 1, layers), Coord(t, 0, 0)).items():
            start = np.flatnonzero(
                (wide[name].reshape(len(wide[name]), -1) == rows.reshape(len(rows), -1)[0]).all(1)
            )
            assert (wide[name][start[0] : start[0] + len(rows)] == rows).all()


@given(st.data())
def test_query_heads_lie_beside_their_key_heads(data):
    spec = data.draw(specs())
    layout = data.draw(layouts(spec))
    group = spec.num_heads // spec.num_kv_heads
    for t in range(layout.tp):
        held: dict[str, list[Box]] = {}
        for name, box in boxes(spec, layout, Coord(t, 0, 0)):
            held.setdefault(name, []).append(box)
        heads = _heads(held["model.layers.0.self_attn.q_proj.weight"], spec)
        kv = _heads(held["model.layers.0.self_attn.k_proj.weight"], spec)
        assert sorted(heads) == list(
            range(t * spec.num_heads // layout.tp, (t + 1) * spec.num_heads // layout.tp)
        )
        assert {head // group for head in heads} == set(kv)
        assert kv == _heads(held["model.layers.0.self_attn.v_proj.weight"], spec)


def _heads(found, spec):
    return [
        head
        for box in found
        for head in range(box.intervals[0][0] // spec.head_dim, box.intervals[0][1] // spec.head_dim)
    ]


@given(st.data())
def test_zero_rows_cut_storages_into_boxes(data):
    spec = data.draw(specs(max_layers=1))
    layout = data.draw(layouts(spec))
    dp = data.draw(st.integers(1, 5))
    whole = numbered(spec)
    coord = layout.coord(data.draw(st.integers(0, layout.world - 1)))
    for param in local_params(spec, layout, coord):
        parts = []
        for d in range(dp):
            start, stop = zero_rows(param, dp, d)
            assert stop - start <= -(-param.rows // dp)
            part = np.zeros((stop - start, param.row_size), dtype=np.int64)
            for piece in param.clip(start, stop):
                rows = whole[piece.tensor][piece.box.slices]
                rows = (rows.T if piece.dim else rows).reshape(piece.rows, -1)
                part[piece.start - start : piece.stop - start] = rows
            parts.append(part)
        assert (np.concatenate(parts).reshape(param.shape) == stored(param, whole)).all()


def test_interleaving_and_transposition():
    spec = ModelSpec("llama", 10, 8, 12, 1, 4, 2, 2)
    params = {p.name: p for p in local_params(spec, Layout.even(2, 1, 1, 1), Coord(1, 0, 0))}
    qkv = [(p.tensor.split(".")[-2], p.box.intervals[0], p.start) for p in params["layers.0.qkv"].pieces]
    assert qkv == [("q_proj", (4, 8), 0), ("k_proj", (2, 4), 4), ("v_proj", (2, 4), 6)]
    gate_up = [
        (p.tensor.split(".")[-2], p.box.intervals[0], p.start) for p in params["layers.0.gate_up"].pieces
    ]
    assert gate_up == [
        ("gate_proj", (6, 9), 0),
        ("up_proj", (6, 9), 3),
        ("gate_proj", (9, 12), 6),
        ("up_proj", (9, 12), 9),
    ]
    down = params["layers.0.down"]
    assert (down.shape, down.transposed, down.pieces[0].box) == ((6, 8), True, Box(((0, 8), (6, 12))))
    assert (down.rows, down.row_size, down.size) == (6, 8, 48)


def test_tied_embeddings_have_one_storage_on_one_stage_and_two_on_more():
    spec = ModelSpec("llama", 10, 8, 12, 2, 4, 2, 2, tie_embeddings=True)
    one = {p.name for p in local_params(spec, Layout.even(1, 1, 1, 2), Coord(0, 0, 0))}
    assert {"embed", "final_norm"} <= one
    assert "head" not in one
    layout = Layout.even(2, 2, 1, 2)
    last = {p.name: p for p in local_params(spec, layout, Coord(1, 1, 0))}
    assert last["head"].pieces[0].tensor == "model.embed_tokens.weight"
    assert "embed" not in last
    tied = spec.tensors()[0]
    assert stages_of(tied, layout) == (0, 1)
    assert sharers(tied, layout, Coord(1, 1, 0)) == (Coord(1, 0, 0), Coord(1, 1, 0))


def test_vocabulary_padding_lies_outside_every_box():
    spec = ModelSpec("llama", 9, 8, 16, 1, 8, 8, 1)
    rows = []
    for t in range(8):
        head = next(
            p for p in local_params(spec, Layout.even(8, 1, 1, 1), Coord(t, 0, 0)) if p.name == "head"
        )
        assert head.shape == (2, 8)
        rows.append(sum(piece.rows for piece in head.pieces))
    assert rows == [2, 2, 2, 2, 1, 0, 0, 0]


def test_intersect():
    box = Box(((0, 4), (2, 6)))
    assert box.intersect(Box(((3, 9), (0, 3)))) == Box(((3, 4), (2, 3)))
    assert box.intersect(Box(((4, 9), (0, 3)))) is None
    assert (box.shape, box.size) == ((4, 4), 16)
