"""Rotary frequencies against transformers, rotations against products of complex numbers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle.model.rope import frequencies, rotate, rotation
from puzzle.spec.model import Rope

NAMES = {"original_max_positions": "original_max_position_embeddings", "theta": "rope_theta"}


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        Rope(500.0, "linear", 2.5),
        Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 32),
        Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        Rope(500000.0, "llama3", 8.0, 2.0, 64.0, 8192),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(rope: Rope, head_dim: int) -> None:
    keys = {NAMES.get(name, name): value for name, value in asdict(rope).items() if name != "scaling"}
    keys["rope_type"] = rope.scaling
    if rope.scaling == "linear":
        keys = {name: keys[name] for name in ("rope_type", "rope_theta", "factor")}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=1 << 17, rope_parameters=keys)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, torch.device("cpu"))
    assert factor == 1.0
    ours = frequencies(rope, head_dim)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    if rope.scaling == "llama3" and head_dim == 128:  # kept, blended and stretched ones are among them
        ratios = frequencies(Rope(rope.theta), head_dim) / ours
        assert (ratios == 1.0).any()
        assert ((ratios > 1.01) & (ratios < 0.99 * rope.factor)).any()
        assert (ratios > 0.999 * rope.factor).any()


def test_plain_frequencies_are_powers_of_theta() -> None:
    found = frequencies(Rope(100.0), 6)
    assert found.tolist() == pytest.approx([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_halves_turn_like_complex_numbers(dtype: torch.dtype) -> None:
    positions, freq = torch.tensor([0, 1, 5, 3000]), torch.tensor([1.0, 0.3, 0.01])
    x = torch.randn(4, 2, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = rotation(positions, freq, dtype)
    assert cos.shape == sin.shape == (4, 1, 1, 6)
    assert cos.dtype == sin.dtype == dtype
    turned = torch.complex(*x.double().chunk(2, -1))
    angle = positions.double()[:, None] * freq.double()
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    limit = {torch.float32: 1e-3, torch.bfloat16: 3e-2}[dtype]
    got = rotate(x, cos, sin)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), torch.cat((turned.real, turned.imag), -1), rtol=limit, atol=limit
    )
