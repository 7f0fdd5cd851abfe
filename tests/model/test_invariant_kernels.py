"""Kernels of invariant numerics against plain torch, in Triton's interpreter: no GPU is needed.

That their numbers are bitwise those of other shapes only a GPU can show (`puzzle bench exact`): the
interpreter multiplies as numpy does.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this host has a GPU: `puzzle bench exact` runs the kernels there", allow_module_level=True)

from puzzle.engine.train import norms
from puzzle.model.attention import KVCache, packed_attention
from puzzle.model.kernels import invariant_attention, invariant_gemm, invariant_sums
from puzzle.model.kernels import invariant_attention_grads as attention_grads
from puzzle.model.kernels.invariant_attention_blocks import SIDE, Tile, fitting
from puzzle.model.packing import pack


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("rows", [37, 140])
@pytest.mark.parametrize("turned", [(False, True), (True, False)])
def test_products(rows: int, parts: int, turned: tuple[bool, bool]) -> None:
    """Every way of a product: parts side by side, in turn, and the copy engine's for many rows of 16 bits."""
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 1e-4)):
        x, w = random((rows, 512), 0, dtype), random((72, 512), 1, dtype)
        expected = x.double() @ w.double().t()
        x, w = (m.t().contiguous().t() if turn else m for m, turn in zip((x, w), turned, strict=True))
        got = invariant_gemm.product(x, w, parts, dtype=torch.float32)
        assert (got - expected).abs().max() <= limit
        total = random((rows, 72), 2)
        if parts == 1:
            out = total.clone()
            invariant_gemm.product(x, w, out=out, add=True)
            assert (out - total - expected).abs().max() <= limit


def test_tiles_of_the_copy_engine() -> None:
    """Those of any shape that a multiprocessor may take, and loops that are one, give the same sums."""
    x, w = random((200, 256), 0, torch.float16), random((136, 256), 1, torch.float16)
    expected = x.double() @ w.double().t()
    for tile in (
        invariant_gemm.Tile(64, 32, 128, 4, 2, 2),
        invariant_gemm.Tile(128, 64, 64, 8, 3, flat=True),
        invariant_gemm.Tile(64, 32, 64, 8, 3, halves=True, band=3),
    ):
        for parts in (1, 2):
            got = invariant_gemm.product(x, w, parts, dtype=torch.float32, tile=tile)
            assert (got - expected).abs().max() <= 1e-4
        invariant_gemm.product(x, w, out=got, add=True, tile=tile)
        assert (got - 2 * expected).abs().max() <= 2e-4


def test_what_does_not_go_in_parts_is_refused() -> None:
    x = random((3, 12), 0)
    for parts, add in ((3, False), (8, False), (2, True)):
        with pytest.raises(ValueError, match="parts"):
            invariant_gemm.product(x, x, parts, out=random((3, 3), 1), add=add)


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "window"), [(4, 2, 32, None), (4, 1, 24, 9), (2, 2, 16, 70)]
)
def test_packed_attention(heads: int, groups: int, dim: int, window: int | None) -> None:
    batch = pack([list(range(n)) for n in (7, 130, 1, 70)], 16)
    q, k, v = (random((batch.total, n, dim), i) for i, n in enumerate((heads, groups, groups)))
    count = sum(batch.lengths)
    grad = random((count, heads, dim), 3)
    found = []
    for attention in (invariant_attention.packed, packed_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, batch, window)[:count]
        found.append((out, *torch.autograd.grad((out * grad).sum(), leaves)))
    for ours, plain in zip(*found, strict=True):
        assert (ours[:count] - plain[:count]).abs().max() <= 2e-5


@pytest.mark.parametrize(("queries", "keys"), [(128, 64), (64, 128), (32, 32)])
def test_tiles_of_packed_attention(queries: int, keys: int) -> None:
    """Queries and keys that are not as many as a block has, against plain attention."""
    batch, window = pack([list(range(n)) for n in (7, 140)], 16), 70
    q, k, v, grad = (random((batch.total, n, 16), i) for i, n in enumerate((2, 1, 1, 2)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = packed_attention(*leaves, batch, window)
    count = sum(batch.lengths)
    wanted = torch.autograd.grad((plain * grad)[:count].sum(), leaves)
    grad[count:] = 0.0
    tile = Tile(queries, keys, 4, 1)
    out, sums = invariant_attention.attend(q, k, v, batch, window, tile._replace(keys=SIDE))
    saved = attention_grads.Saved(q, k, v, out, sums, batch, window)
    grad_q, delta = attention_grads.of_queries(saved, grad, tile)
    found = (out, grad_q, *attention_grads.of_keys(saved, grad, delta, tile))
    for ours, expected in zip(found, (plain, *wanted), strict=True):
        assert (ours[:count] - expected[:count]).abs().max() <= 2e-5


def test_tiles_fit_into_shared_memory() -> None:
    """What is largest first; a head of 256 numbers, or of float32, has to take less."""
    tiles = attention_grads.QUERY_TILES

    def chosen(dim: int, dtype: torch.dtype) -> int:
        given = torch.empty((1, 1, dim), dtype=dtype)
        return tiles.index(fitting(tiles, given, lambda t: 2 * t.queries + 2 * t.stages * t.keys))

    assert chosen(128, torch.bfloat16) == 0
    assert [chosen(256, torch.bfloat16), chosen(256, torch.float32)] == [0, 2]
    assert chosen(512, torch.float32) == len(tiles) - 1


@pytest.mark.parametrize("window", [None, 30])
def test_attention_behind_cached_tokens(window: int | None) -> None:
    """The first segment goes on behind `past` keys."""
    past, batch = 83, pack([list(range(n)) for n in (70, 5)], 1, past=83)
    q = random((75, 4, 16), 0)
    k, v = random((past + 75, 2, 16), 1), random((past + 75, 2, 16), 2)
    ours = invariant_attention.packed(q, k, v, batch, window)
    assert (ours - packed_attention(q, k, v, batch, window)).abs().max() <= 2e-5


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("page", [16, 128])
def test_decode_attention_equals_packed(page: int, window: int | None) -> None:
    """Rows of one run and of several, whose pages lie anywhere."""
    lengths, heads, groups, dim = (1, 40, 130, 700), 4, 2, 16
    batch = pack([list(range(n)) for n in lengths])
    q, k, v = (random((batch.total, n, dim), i) for i, n in enumerate((heads, groups, groups)))
    most = -(-max(lengths) // page)
    table = torch.randperm(len(lengths) * most, generator=torch.Generator().manual_seed(5)).view(-1, most)
    cache = KVCache(*(torch.full((1, groups, table.numel(), page, dim), torch.nan) for _ in "kv"))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for row, length in enumerate(lengths):
        at = torch.arange(length)
        cache.at(table[row, at // page] * page + at % page).slots(0).write(
            k[starts[row] : starts[row + 1]], v[starts[row] : starts[row + 1]]
        )
    last = batch.last_rows
    slots = cache.at(last, table.int()).slots(0)
    got = invariant_attention.decode(q[last], slots, torch.tensor(lengths) - 1, window)
    assert (got - packed_attention(q, k, v, batch, window)[last]).abs().max() <= 2e-5


def test_sums_of_exponentials() -> None:
    logits = random((5, 3000), 0) * 3
    top = logits.amax(1)
    got = invariant_sums.exponentials(logits, top, 40).double() * 2.0**-40
    assert (got - (logits - top[:, None]).double().exp().sum(1)).abs().max() <= 1e-5
    halves = [invariant_sums.exponentials(part, top, 40) for part in (logits[:, :1111], logits[:, 1111:])]
    assert torch.equal(halves[0] + halves[1], invariant_sums.exponentials(logits, top, 40))


@pytest.mark.parametrize("count", [1, 2048, 40_001])
def test_squares_are_those_of_integers(count: int) -> None:
    """Against whole numbers of Python, and bit for bit against plain torch."""
    grads = random((count + 3,), 0)[3:] * torch.logspace(-12, 0, count)
    scale = torch.tensor(2.0 ** -int(torch.frexp(grads.abs().amax()).exponent), dtype=torch.float64)
    limbs = torch.zeros(2, dtype=torch.int64)
    invariant_sums.squares(grads, scale, limbs, norms.LIMB)
    mine, plain = (
        (int(high) << norms.LIMB) + int(low) for high, low in (limbs, norms._limbs([grads], scale))
    )
    assert mine == plain
    assert mine == sum(
        math.floor(Fraction(float(g) * float(scale)) ** 2 * 2**50 + Fraction(1, 2)) for g in grads
    )
