"""Algorithms without a critic: a response's advantage is its score beside those of its group, the samples of
one prompt; every token of the response has it.

Sources: GRPO, Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), section 4.1, outcome supervision; Dr. GRPO,
Liu et al. 2025 (arXiv:2503.20783), section 3; RLOO, Ahmadian et al. 2024 (arXiv:2402.14740), section 2.3.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from puzzle.rlhf.algorithms.policy import ClippedPolicy, token_kl
from puzzle.rlhf.algorithms.scale import divisor_of, limited
from puzzle.rlhf.experience import Experience


class GroupPolicy(ClippedPolicy):
    """The actor learns alone, from scores within groups of two responses or more."""

    @staticmethod
    @abstractmethod
    def of_group(scores_G: Tensor) -> Tensor:
        """float64 (G,): the advantages of one group of responses."""

    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """Scores, clipped and less the response's KL where that is part of the reward, within groups."""
        mask_BS = experience.counted_BS.to(scores_B.device)
        rewards_B = limited(scores_B, self.config.reward_clip).double()
        if self.config.kl.place == "reward" and experience.ref_logprobs_BS is not None:
            assert experience.logprobs_BS is not None
            kl_BS = token_kl(experience.logprobs_BS, experience.ref_logprobs_BS, self.config.kl.estimator)
            rewards_B = rewards_B - kl_coef * torch.where(mask_BS, kl_BS, 0.0).sum(1, dtype=torch.float64)
        advantages_B = group_advantages(rewards_B, experience.samples, self.of_group).to(scores_B.dtype)
        advantages_BS = torch.where(mask_BS, advantages_B[:, None], 0.0)
        return replace(experience, scores_B=scores_B, advantages_BS=advantages_BS)


def group_advantages(rewards_B: Tensor, samples: int, of_group: Callable[[Tensor], Tensor]) -> Tensor:
    """float64 (B,): `of_group` of every run of `samples` rewards.

    ValueError for groups of one, which say nothing.
    """
    if samples < 2:
        raise ValueError("a group of one response has nothing to compare; give 2 samples or more")
    rewards_GS = rewards_B.double().cpu().reshape(-1, samples)  # at once: of_group reads numbers
    return torch.cat([of_group(group) for group in rewards_GS]).to(rewards_B.device)


class GRPO(GroupPolicy):
    """Less the group's mean, over its standard deviation (divided by the count less one)."""

    @staticmethod
    def of_group(scores_G: Tensor) -> Tensor:
        """Zeros where the scores are all equal but for rounding."""
        divisor = divisor_of(float(scores_G.mean()), float(scores_G.var()))
        return torch.zeros_like(scores_G) if divisor is None else (scores_G - scores_G.mean()) / divisor


class DrGRPO(GroupPolicy):
    """Less the group's mean; neither deviation nor length divides, so hard prompts and long answers weigh no
    more than others."""

    @staticmethod
    def of_group(scores_G: Tensor) -> Tensor:
        """The distance from the mean."""
        return scores_G - scores_G.mean()


class RLOO(GroupPolicy):
    """Less the mean of the others in the group: an unbiased baseline."""

    @staticmethod
    def of_group(scores_G: Tensor) -> Tensor:
        """The distance from the mean of the others."""
        return scores_G - (scores_G.sum() - scores_G) / (len(scores_G) - 1)
