"""Norms that the products around them do, in Triton's interpreter, against norms by themselves."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this host has a GPU: `puzzle bench check` runs the kernels there", allow_module_level=True)

from puzzle.model import linear, pointwise
from puzzle.model.decoder import Decoder, Layer
from puzzle.model.kernels import skinny_gemm as skinny
from puzzle.model.packing import DecodeBatch
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import initialise
from puzzle.plan.layout import Coord, Layout
from puzzle.spec.model import ModelSpec
from tests.model.test_kernels import close, random

EPS = 0.03
SPEC = ModelSpec("qwen3", 200, 384, 128, 3, 4, 2, 64, EPS, qk_norm=True)
"""The hidden size has six tiles of columns: no power of two."""
HALF = torch.float16
"""For Triton's interpreter multiplies no bf16."""


@pytest.mark.parametrize("rows", [1, 3, 40, 64])
@pytest.mark.parametrize("narrow", [skinny.NARROW, 0])
def test_a_norm_between_two_products(monkeypatch: pytest.MonkeyPatch, rows: int, narrow: int) -> None:
    """Rows of very different size, with a weight of its own for each column."""
    monkeypatch.setattr(skinny, "NARROW", narrow)
    hidden = SPEC.hidden_size
    x, inward = random((rows, 256), torch.float32, 1), random((256, hidden), torch.float32, 2)
    before = random((rows, hidden), torch.float32, 3) * 100.0 ** torch.linspace(-2, 2, rows)[:, None]
    norm, weight = random((hidden,), torch.float32, 4), random((256, hidden), torch.float32, 5)
    total, normed = pointwise.add_norm(before, x @ inward, norm, EPS)
    for _ in range(2):
        stream = skinny.add(x, inward, before, norm, EPS)
        close(stream.total, total, torch.float32)
        close(stream.product(weight), normed @ weight.t(), torch.float32)
        both = pointwise.gated(normed @ weight.t(), 2)
        close(stream.gates(weight, 2), both, torch.float32)


def test_rounding_is_that_of_a_sum_and_a_norm() -> None:
    """The product is rounded, then the sum, and squares are those of what was rounded."""
    x, inward = random((5, 128), HALF, 1), random((128, 128), HALF, 2)
    before, norm = random((5, 128), HALF, 3), random((128,), HALF, 4)
    stream = skinny.add(x, inward, before, norm, EPS)
    product = skinny.product(x, inward, True)
    assert torch.equal(stream.total, before + product)
    assert torch.equal(stream.weighted, stream.total * norm)
    tiles = stream.total.float().view(5, 2, skinny.COLUMNS).square().sum(2).t()
    torch.testing.assert_close(stream.squares, tiles, rtol=1e-6, atol=0)


def stage(spec: ModelSpec, pp: int = 1, p: int = 0) -> Decoder:
    layout = Layout.even(1, pp, 1, spec.num_layers)
    decoder = Decoder(spec, layout, Coord(0, p, 0), TensorGroup(), HALF)
    initialise(decoder, 3)
    with torch.no_grad():
        for number, (name, weight) in enumerate(decoder.named_parameters()):
            if name.endswith("norm"):
                weight.copy_(1 + 0.3 * random(tuple(weight.shape), torch.float32, number))
    return decoder


def outputs(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, x: Tensor, kernels: bool) -> Tensor:
    """Of a decode pass behind two cached tokens."""
    for module in ("numerics", "linear"):
        monkeypatch.setattr(f"puzzle.model.{module}.has_kernels", lambda _: kernels)
    rows, cache = len(x), decoder.new_cache(len(x), 16)
    table = torch.arange(rows, dtype=torch.int32)[:, None]
    with torch.no_grad():
        for position in range(3):
            at = torch.full((rows,), position)
            into = torch.arange(rows) * 16 + position
            batch = DecodeBatch(torch.zeros(rows, dtype=torch.int64), at, position + 1)
            out = decoder(x.roll(position, 0), batch, cache.at(into, table))
    return out


@pytest.fixture
def norms_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every norm that products did."""
    found: list[int] = []
    add = skinny.add

    def counted(x: Tensor, *given: Any) -> linear.Stream:
        found.append(len(x))
        return add(x, *given)

    monkeypatch.setattr(skinny, "add", counted)
    return found


@pytest.mark.parametrize(("pp", "p"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_a_decode_pass(monkeypatch: pytest.MonkeyPatch, norms_done: list[int], pp: int, p: int) -> None:
    """The kernels give what the plain path gives, on every stage; of a stage's norms they leave the first
    and the last."""
    monkeypatch.setattr(linear, "NORMED", HALF)
    decoder = stage(SPEC, pp, p)
    x = torch.arange(5) if p == 0 else random((5, SPEC.hidden_size), HALF, 6)
    plain = outputs(monkeypatch, decoder, x, False)
    assert not norms_done
    close(outputs(monkeypatch, decoder, x, True), plain, HALF)
    assert norms_done == [5] * 3 * (2 * len(decoder.layers) - 1)


@pytest.mark.parametrize("why", ["bias", "rows", "width", "dtype", "gradients"])
def test_norms_by_themselves(monkeypatch: pytest.MonkeyPatch, norms_done: list[int], why: str) -> None:
    """Where anything stands between a product and its norm, or no kernel takes the product."""
    spec = replace(SPEC, num_layers=1)
    if why == "bias":
        spec = replace(spec, out_bias=True)
    if why == "width":
        spec = replace(spec, intermediate_size=192)
    decoder = stage(spec)
    if why != "dtype":
        monkeypatch.setattr(linear, "NORMED", HALF)
    if why == "rows":
        monkeypatch.setattr(linear, "FEW", 4)
    monkeypatch.setattr("puzzle.model.linear.has_kernels", lambda _: True)
    batch = DecodeBatch(torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), 1)
    (layer,) = decoder.layers.values()
    assert isinstance(layer, Layer)
    with torch.set_grad_enabled(why == "gradients"):
        assert not layer.owes(len(batch.positions_T), decoder.numerics)
    assert not norms_done
