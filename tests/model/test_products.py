"""Gradients that products add up themselves are those of autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model.linear import Weight, accumulate, linear, product, sums_in_place


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_takes_what_autograd_would(transposed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn((6, 10) if transposed else (10, 6), generator=generator).to(dtype)
    plain, sunk = (Weight(matrix.clone()) for _ in range(2))
    total = torch.full(matrix.shape, torch.nan)
    taken: list[int] = []

    def sink(left: Tensor, right: Tensor) -> None:
        accumulate(total, left, right, not taken)
        taken.append(1)

    sunk.sink = sink
    expected = torch.zeros(matrix.shape)
    for _ in range(3):
        x = torch.randn(7, 6, generator=generator).to(dtype)
        bias, weights = (
            torch.randn(10, generator=generator).to(dtype),
            torch.randn(7, 10, generator=generator),
        )
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outs = [
            F.linear(inputs[0], plain.t() if transposed else plain, bias),
            linear(inputs[1], sunk, bias, transposed),
        ]
        torch.testing.assert_close(outs[0], outs[1], rtol=0.02, atol=0.02)
        for out in outs:
            (out * weights.to(dtype)).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        assert plain.grad is not None
        expected += plain.grad
        plain.grad = None
    assert sunk.grad is None
    assert len(taken) == 3
    torch.testing.assert_close(total, expected)


def test_without_gradients_no_sink_is_asked() -> None:
    weight = Weight(torch.ones(2, 3))
    weight.sink = lambda left, right: pytest.fail("asked")
    with torch.no_grad():
        assert linear(torch.ones(1, 3), weight).tolist() == [[3.0, 3.0]]
    assert not sums_in_place(torch.device("cpu"))


@pytest.mark.parametrize("kept", [1.0, 0.0])
def test_sums_that_torch_gets_wrong_are_not_left_to_it(monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(left.to(out_dtype) @ right.to(out_dtype))

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(kept * total + left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert sums_in_place.__wrapped__(torch.device("cpu")) is (kept == 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_without_gradients_equal_float64(dtype, rows, transposed):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 40), (24, 40)))
    bias = torch.randn(24, generator=generator).to(dtype)
    expected = x.double() @ weight.double().t() + bias.double()
    with torch.no_grad():
        got = linear(x, weight.t().contiguous() if transposed else weight, bias, transposed)
    assert got.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.double() - expected).abs().max() <= limit * expected.abs().max()


def test_a_product_with_no_columns():
    assert product(torch.randn(3, 8), torch.empty(0, 8)).shape == (3, 0)
