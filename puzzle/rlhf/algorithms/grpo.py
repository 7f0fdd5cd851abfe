"""GRPO: no critic; a response's advantage is its score beside those of its group, the samples of one prompt.

Source: Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), section 4.1: outcome supervision, equation 3 with
the KL estimate k3 in the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from puzzle.rlhf.algorithms.policy import ClippedPolicy, divisor_of
from puzzle.rlhf.experience import Experience


def group_advantages(scores_B: Tensor, samples: int) -> Tensor:
    """float32 (B,): each score less its group's mean, over its group's standard deviation (divided by the
    count less one). Rows of a group stand together; a group of equal scores gives zeros.

    ValueError for groups of one, which say nothing.
    """
    if samples < 2:
        raise ValueError("a group of one response has no deviation; give 2 samples or more")
    advantages = []
    for group in scores_B.double().reshape(-1, samples):
        mean, variance = float(group.mean()), float(group.var())
        divisor = divisor_of(mean, variance)
        advantages.append(torch.zeros_like(group) if divisor is None else (group - mean) / divisor)
    return torch.cat(advantages).to(scores_B.dtype)


class GRPO(ClippedPolicy):
    """The actor learns alone; every token of a response has the response's advantage."""

    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """Scores standardised within groups, at every response token."""
        clip = self.config.reward_clip
        limited_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
        advantages_B = group_advantages(limited_B, experience.samples)
        mask_BS = experience.mask_BS.to(advantages_B.device)
        advantages_BS = torch.where(mask_BS, advantages_B[:, None], 0.0)
        return replace(experience, scores_B=scores_B, advantages_BS=advantages_BS)
