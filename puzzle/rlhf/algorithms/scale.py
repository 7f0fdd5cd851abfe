"""Limits and scales of scores and advantages.

Masks are boolean, True at response tokens; what lies outside them may hold anything, NaN too, and reaches no
result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WHITEN_EPS = 1e-8
RESOLUTION = 2.0**-20
"""Of float32 values, which differ by 8 units in the last place or less: they are equal but for rounding."""


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: sum, sum of squares and count of x inside the mask. Add them over replicas before
    `whiten`.
    """
    inside = torch.where(mask, x, 0.0).double()
    return torch.stack([inside.sum(), inside.square().sum(), mask.sum().double()])


def divisor_of(mean: float, variance: float) -> float | None:
    """sqrt(variance + 1e-8), what values are divided by to bring their variance to 1.

    None where they are equal but for rounding: a division would blow the rounding up.
    """
    if variance <= RESOLUTION**2 * (mean * mean + variance):
        return None
    return math.sqrt(variance + WHITEN_EPS)


def whiten(x: Tensor, mask: Tensor, moments_3: Tensor) -> Tensor:
    """Bring the mean and variance of the whole batch (from `moments`) to 0 and 1; 0 outside the mask.

    (x - mean) / sqrt(var + 1e-8), var divided by the count: advantage normalisation of PPO implementations.
    Values that are all equal become 0.
    """
    total, squares, count = moments_3.tolist()
    if count == 0:
        return torch.zeros_like(x)
    mean = total / count
    divisor = divisor_of(mean, squares / count - mean * mean)
    if divisor is None:
        return torch.zeros_like(x)
    return torch.where(mask, (x - mean) / divisor, 0.0)


def limited(scores_B: Tensor, clip: float | None) -> Tensor:
    """Scores clamped to +- clip; None: as they are."""
    return scores_B if clip is None else scores_B.clamp(-clip, clip)
