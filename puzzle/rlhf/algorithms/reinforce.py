"""REINFORCE without a critic: what follows a token, less a baseline, is its advantage.

Sources: REINFORCE++ and its variant with a group's mean as the baseline, Hu 2025 (arXiv:2501.03262); ReMax,
Li et al. 2023 (arXiv:2310.10505), section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from puzzle.rlhf.algorithms.groups import DrGRPO, group_advantages
from puzzle.rlhf.algorithms.policy import ClippedPolicy, token_kl
from puzzle.rlhf.algorithms.ppo import gae, token_rewards
from puzzle.rlhf.algorithms.scale import limited, moments, whiten
from puzzle.rlhf.experience import Experience


class ReturnsPolicy(ClippedPolicy):
    """The actor learns alone, from the discounted sums of rewards per token: the KL of every token, where
    that is part of the reward, and at the last token what the response earns."""

    @abstractmethod
    def earned(self, experience: Experience, scores_B: Tensor) -> Tensor:
        """float32 (B,): what each response earns."""

    def returns(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Tensor:
        """float32 (B, S): the sum of rewards from each token on, 0 outside the mask."""
        c = self.config
        mask_BS = experience.counted_BS.to(scores_B.device)
        kl_BS = None
        if c.kl.place == "reward" and experience.ref_logprobs_BS is not None:
            assert experience.logprobs_BS is not None
            kl_BS = token_kl(experience.logprobs_BS, experience.ref_logprobs_BS, c.kl.estimator)
        rewards_BS = token_rewards(self.earned(experience, scores_B), kl_BS, mask_BS, kl_coef, None)
        # Without values and with lambda 1 the generalised advantage is the return.
        return gae(rewards_BS, torch.zeros_like(rewards_BS), mask_BS, c.gamma, 1.0)[0]

    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """The returns."""
        returns_BS = self.returns(experience, scores_B, kl_coef)
        return replace(experience, scores_B=scores_B, advantages_BS=returns_BS)


class ReinforcePP(ReturnsPolicy):
    """REINFORCE++: returns of scores, brought to mean 0 and variance 1 over all tokens of the batch."""

    def earned(self, experience: Experience, scores_B: Tensor) -> Tensor:
        """The score."""
        return limited(scores_B, self.config.reward_clip)

    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """Normalised returns."""
        returns_BS = self.returns(experience, scores_B, kl_coef)
        mask_BS = experience.counted_BS.to(scores_B.device)
        advantages_BS = whiten(returns_BS, mask_BS, moments(returns_BS, mask_BS))
        return replace(experience, scores_B=scores_B, advantages_BS=advantages_BS)


class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++ of scores less the mean of their group, two responses or more."""

    def earned(self, experience: Experience, scores_B: Tensor) -> Tensor:
        """The distance from the group's mean."""
        earned_B = super().earned(experience, scores_B)
        return group_advantages(earned_B, experience.samples, DrGRPO.of_group).to(scores_B.dtype)


class ReMax(ReturnsPolicy):
    """Returns of scores less the score of the greedy response to the same prompt."""

    wants_greedy = True

    def earned(self, experience: Experience, scores_B: Tensor) -> Tensor:
        """How much better the response is than the likeliest one."""
        assert experience.greedy_scores_P is not None
        clip = self.config.reward_clip
        baselines_B = limited(experience.greedy_scores_P, clip).repeat_interleave(experience.samples)
        return limited(scores_B, clip) - baselines_B
