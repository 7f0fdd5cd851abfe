"""Rotary position embedding in the half-rotation convention of Hugging Face checkpoints.

Sources: Su et al. 2021 (RoFormer); "linear" is position interpolation (Chen et al. 2023); "llama3" is the
interpolation by frequency of Llama 3.1: wavelengths beyond the original context are stretched by `factor`,
short ones are kept, those between are blended.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puzzle.spec.model import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 (head_dim / 2,): radians per position of each pair of coordinates."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq = 1.0 / rope.theta**exponent
    if rope.scaling == "linear":
        return freq / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_positions * freq / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return (1 - keep) * freq / rope.factor + keep * freq
    return freq


def rotation(positions_T: Tensor, freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (T, 1, 1, head_dim) for `rotate`; angles are computed in float32."""
    angle = positions_T.float()[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of (T, K, heads, head_dim) by the angle of the position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
