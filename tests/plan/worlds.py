"""Small models of every kind, layouts they allow, and their weights as numbered numpy arrays."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.layout import Coord, Layout
from puzzle.plan.shards import LocalParam, local_params
from puzzle.spec.lora import PROJECTIONS, Lora
from puzzle.spec.model import ModelSpec


@st.composite
def specs(draw, max_layers=6):
    """Any family and head with small numbers; head_dim need not be hidden / heads."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv * draw(st.sampled_from([1, 2, 3, 4]))
    attention_bias = family in ("llama", "qwen3") and draw(st.booleans())
    return ModelSpec(
        family,
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=draw(st.sampled_from([4, 6])),
        intermediate_size=heads * draw(st.sampled_from([1, 2])),
        num_layers=draw(st.integers(1, max_layers)),
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=family == "llama" and draw(st.booleans()),
        qk_norm=family == "qwen3",
        head=draw(st.sampled_from(["lm", "value"])),
        lora=draw(st.none() | adapters()),
    )


@st.composite
def adapters(draw):
    """Adapters of some projections."""
    targets = draw(st.sets(st.sampled_from(PROJECTIONS), min_size=1))
    return Lora(draw(st.integers(1, 3)), 1.0, tuple(name for name in PROJECTIONS if name in targets))


def legal_tps(spec: ModelSpec) -> list[int]:
    """Every tensor-parallel size that `Layout.check` accepts."""
    found = []
    for tp in range(1, spec.num_heads + 1):
        try:
            Layout.even(tp, 1, 1, spec.num_layers).check(spec)
        except UserError:
            continue
        found.append(tp)
    return found


@st.composite
def layouts(draw, spec, max_world=8):
    """A layout that the model allows, stages even or not."""
    tp = draw(st.sampled_from([n for n in legal_tps(spec) if n <= max_world]))
    pp = draw(st.integers(1, min(spec.num_layers, max_world // tp)))
    dp = draw(st.integers(1, max_world // (tp * pp)))
    cuts = draw(st.permutations(range(1, spec.num_layers)))[: pp - 1]
    borders = [0, *sorted(cuts), spec.num_layers]
    return Layout(tp, pp, dp, tuple(b - a for a, b in pairwise(borders)))


def numbered(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Every logical tensor, filled so that no two elements of the model are equal and none is 0."""
    arrays, start = {}, 1
    for tensor in spec.tensors():
        arrays[tensor.name] = np.arange(start, start + tensor.size).reshape(tensor.shape)
        start += tensor.size
    return arrays


def stored(param: LocalParam, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The storage of a local parameter, cut from whole tensors; padding is 0."""
    storage = np.zeros(param.shape, dtype=np.int64)
    for piece in param.pieces:
        rows = arrays[piece.tensor][piece.box.slices]
        storage[piece.start : piece.stop] = rows.T if param.transposed else rows
    return storage


def storages(spec: ModelSpec, layout: Layout, coord: Coord) -> dict[str, np.ndarray]:
    """All storages of a coordinate by name."""
    arrays = numbered(spec)
    return {param.name: stored(param, arrays) for param in local_params(spec, layout, coord)}
