"""What invariant numerics are made of: sums and products whose bits do not depend on what is beside them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puzzle.engine.train import norms
from puzzle.model.invariant import pointwise
from puzzle.model.invariant import products as made
from puzzle.model.invariant.sums import equal_parts, exact_sum, tree_sum
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from tests.model.tiny import VARIANTS, save_variant, sequences, stage


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 70), st.integers(0, 3), st.integers(0, 40))
def test_a_tree_goes_on_over_equal_parts_and_zeros(length: int, doublings: int, zeros: int) -> None:
    parts = 2**doublings
    x = random(parts * 2 ** math.ceil(math.log2(length)), 3, seed=length)
    whole = tree_sum(x, 0)
    assert torch.equal(tree_sum(torch.stack([tree_sum(part, 0) for part in x.chunk(parts)]), 0), whole)
    assert torch.equal(tree_sum(torch.cat((x, x.new_zeros(zeros, 3))), 0), whole)
    torch.testing.assert_close(whole, x.sum(0), rtol=1e-5, atol=1e-5)


@given(st.permutations(range(300)), st.integers(0, 300))
@settings(max_examples=20)
def test_an_exact_sum_has_no_order(order: list[int], cut: int) -> None:
    x = random(2, 300).tanh()
    whole = exact_sum(x, TensorGroup())
    assert torch.equal(exact_sum(x[:, order], TensorGroup()), whole)
    torch.testing.assert_close(whole, x.double().sum(1).float(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 200), st.integers(1, 90), st.sampled_from([1, 3, 16, 96, 257, 520]), st.randoms())
@settings(max_examples=30, deadline=None)
def test_a_product_does_not_depend_on_other_rows_and_columns(rows, columns, depth, chance) -> None:
    """Any rows and columns of a large product, in any order and storage, computed apart."""
    x, w = random(200, depth, seed=1), random(90, depth, seed=2)
    whole = made.product(x, w)
    m, n = chance.sample(range(200), rows), chance.sample(range(90), columns)
    part = w[n].t().contiguous().t() if chance.random() < 0.5 else w[n]
    assert torch.equal(made.product(x[m], part), whole[m][:, n])
    torch.testing.assert_close(whole, x @ w.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_a_product_are_added_as_ranks_would(parts: int) -> None:
    x, w = random(33, 1040, seed=1), random(40, 1040, seed=2)
    apart = [made.product(a, b) for a, b in zip(x.chunk(parts, 1), w.chunk(parts, 1), strict=True)]
    assert torch.equal(made.product(x, w, parts), tree_sum(torch.stack(apart), 0))


class OneOf(TensorGroup):
    """One of several tensor ranks, which are not there: keeps what it would gather."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.given: list[Tensor] = []

    def all_gather(self, x: Tensor) -> Tensor:
        self.given.append(x[0])
        return x.repeat(self.size, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("depth", [44, 48, 24, 520])
def test_sums_that_do_not_cut_into_all_parts_go_on_over_ranks(depth: int) -> None:
    x, w = random(17, depth, seed=1), random(20, depth, seed=2)
    whole = made.product(x, w, equal_parts(depth, TensorGroup(), 8))
    for ranks in (2, 4):
        here = equal_parts(depth // ranks, OneOf(ranks), 8)
        apart = [made.product(*each, here) for each in zip(x.chunk(ranks, 1), w.chunk(ranks, 1), strict=True)]
        assert torch.equal(tree_sum(torch.stack(apart), 0), whole)


def test_norms_of_fewer_heads_than_parts_go_on_over_ranks() -> None:
    """Of 4 key/value heads under sums of 8 parts, over tokens that are no power of two."""
    heads, tokens, width = 4, 24, 8
    qkv, (cos, sin) = random(tokens, heads * 4 * width), random(2, tokens, 1, 1, width, seed=3)

    def gradient(ranks: int, which: int) -> Tensor:
        apart = []
        for mine in qkv.chunk(ranks, 1):
            group = OneOf(ranks)
            weights = [random(width, seed=n).requires_grad_() for n in (1, 2)]
            out = pointwise.heads(mine, heads // ranks, cos, sin, *weights, 1e-5, group, 8)
            (grad,) = torch.autograd.grad(out[which].sin().sum(), weights[which])
            apart.append(grad if ranks == 1 else group.given[0])
        return tree_sum(torch.stack(apart), 0)

    for which in (0, 1):
        whole = gradient(1, which)
        assert all(torch.equal(gradient(ranks, which), whole) for ranks in (2, 4))


def test_a_blas_that_is_not_steady_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random(33, 70, seed=1), random(20, 70, seed=2)
    monkeypatch.setattr(made, "steady", lambda: False)
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("the BLAS was asked"))
    whole = made.product(x, w)
    torch.testing.assert_close(whole, x @ w.t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(made.product(x[5:6], w[3:4]), whole[5:6, 3:4])


def test_steadiness_is_found_out() -> None:
    plain = torch.bmm
    assert made.steady()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", lambda a, b: plain(a, b) + (1e-6 if a.shape[1] == 48 else 0.0))
        assert not made.steady.__wrapped__()


@pytest.mark.parametrize("largest", [1.0, 1e-18, 1e18])
def test_the_norm_of_gradients_does_not_depend_on_how_they_are_cut(largest: float) -> None:
    grads = random(4001) * torch.logspace(-9, 0, 4001) * largest
    whole = norms.start_exact([grads], grads.device, None)[1]()
    for sizes in ([1, 4000], [1000, 0, 3001], [7] * 571 + [4]):
        parts = list(grads.split(sizes))[::-1]
        assert torch.equal(norms.start_exact(parts, grads.device, None)[1](), whole)
    torch.testing.assert_close(whole.double(), grads.double().square().sum(), rtol=1e-6, atol=0)


def test_gradients_that_lie_side_by_side_are_squared_together() -> None:
    """Only those, and all of them: gaps are left out, and other memory that begins where they end."""
    buffer, other = random(100), random(40, seed=1)
    parts = [
        buffer[:20].view(4, 5),
        buffer[20:20],
        buffer[20:50],
        buffer[60:70].view(2, 5),
        other[30:],
        other[:30],
    ]
    joined = norms._joined(parts)
    assert [len(vector) for vector in joined] == [50, 10, 10, 30]
    assert torch.equal(torch.cat(joined), torch.cat([part.flatten() for part in parts]))


def test_a_square_beside_the_largest_float_is_one() -> None:
    """The power of two that gradients are divided by has a square beyond float32."""
    found = norms.start_exact([torch.tensor([1.5e19, -1.0])], torch.device("cpu"), None)[1]()
    assert found == torch.tensor(1.5e19).square()


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_are_told(odd: float) -> None:
    grads = [random(5), torch.tensor([1.0, odd])]
    assert not norms.start_exact(grads, grads[0].device, None)[1]().isfinite()


def test_no_gradients_have_norm_zero() -> None:
    assert norms.start_exact([torch.zeros(3)], torch.device("cpu"), None)[1]() == 0
    assert norms.start_exact([], torch.device("cpu"), None)[1]() == 0


@pytest.mark.parametrize("variant", ["llama-tied", "llama-biases", "qwen3", "mistral-window"])
def test_stages_compute_what_fast_ones_do(variant: str, tmp_path) -> None:
    """Log-probs, entropies and gradients of all weights, to rounding."""
    assert variant in VARIANTS
    folder = save_variant(tmp_path / "model", variant)
    found = []
    for parts in (None, 2):
        decoder = stage(folder, parts=parts)
        batch = pack(sequences(), decoder.numerics.multiple)
        rows = torch.arange(sum(batch.lengths) - 1)
        hidden = decoder(batch.tokens_T, batch)
        stats = decoder.token_stats(hidden, rows, batch.tokens_T[1 : len(rows) + 1], 0.7, entropy=True)
        assert stats.entropy is not None
        (stats.logprobs.mean() + 0.3 * stats.entropy.mean()).backward()
        found.append((stats, {name: weight.grad for name, weight in decoder.named_parameters()}))
    (fast, fast_grads), (ours, grads) = found
    torch.testing.assert_close(ours.logprobs, fast.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.entropy, fast.entropy, rtol=0, atol=1e-5)
    for name, expected in fast_grads.items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-6, msg=name)
