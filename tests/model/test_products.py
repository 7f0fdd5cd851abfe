"""Gradients that products add up themselves are those of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puzzle.model.products import Weight, accumulate, linear, sums_in_place


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
        outs = [linear(i, w, bias, transposed) for i, w in zip(inputs, (plain, sunk), strict=True)]
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
