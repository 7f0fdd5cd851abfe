"""PPO with a critic: rewards per token, generalised advantages, clipped losses of policy and values.

Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347); GAE, Schulman et al. 2016 (arXiv:1506.02438);
rewards of language models, Ziegler et al. 2019 (arXiv:1909.08593); details of rewards and losses as in
DeepSpeed-Chat (Yao et al. 2023, arXiv:2308.01320).

Rollout functions take right-padded (B, S) tensors: column k belongs to response token k, its log-prob, and
the value of the state before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puzzle.rlhf.algorithms.base import Loss, Outputs
from puzzle.rlhf.algorithms.policy import ClippedPolicy, token_kl, weighted
from puzzle.rlhf.algorithms.scale import limited, moments, whiten
from puzzle.rlhf.algorithms.surrogate import Responses
from puzzle.rlhf.experience import Experience


def token_rewards(
    scores_B: Tensor, kl_BS: Tensor | None, mask_BS: Tensor, kl_coef: float, score_clip: float | None
) -> Tensor:
    """Per-token rewards (B, S): -kl_coef KL everywhere, plus the score clamped to +-score_clip at the last
    answer token.

    Ziegler et al. 2019, equation 2, spread over tokens as in DeepSpeed-Chat. `kl_BS` None means
    reference-free, or that the KL goes into the loss. A row without answer tokens gets no reward.
    """
    if kl_BS is None:
        rewards_BS = scores_B.new_zeros(mask_BS.shape)
    else:
        rewards_BS = torch.where(mask_BS, -kl_coef * kl_BS, 0.0)
    limited_B = limited(scores_B, score_clip)
    length_B = mask_BS.sum(dim=1)
    columns_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_BS = columns_S == length_B[:, None] - 1
    return torch.where(last_BS, rewards_BS + limited_B[:, None].to(rewards_BS.dtype), rewards_BS)


def gae(
    rewards_BS: Tensor, values_BS: Tensor, mask_BS: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, S), 0 outside the mask (Schulman et al. 2016, equation 16, as a backward
    recursion).

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, with values and advantages
    beyond the last answer token 0 (an episode ends there, whether by the end-of-text token or by length);
    returns = advantages + values. The mask of a row is a run of True followed by False. No gradient flows.
    """
    with torch.no_grad():
        values_BS = torch.where(mask_BS, values_BS, 0.0)
        rewards_BS = torch.where(mask_BS, rewards_BS, 0.0)
        next_values_BS = torch.nn.functional.pad(values_BS[:, 1:], (0, 1))
        deltas_BS = rewards_BS + gamma * next_values_BS - values_BS
        advantages_BS = _recursed(deltas_BS, mask_BS, gamma * lam)
        return advantages_BS, advantages_BS + values_BS


def _recursed(deltas_BS: Tensor, mask_BS: Tensor, factor: float) -> Tensor:
    """delta_t + factor times what comes of t + 1, 0 outside the mask.

    On the host: a device would be sent some small kernels for every position, 0.13 ms each, for as many
    numbers as there are rows.
    """
    deltas_SB = np.ascontiguousarray(deltas_BS.t().cpu().numpy())
    mask_SB = np.ascontiguousarray(mask_BS.t().cpu().numpy())
    found_SB, following_B = np.zeros_like(deltas_SB), np.zeros_like(deltas_SB, shape=len(deltas_BS))
    rounded = deltas_SB.dtype.type(factor)
    for t in reversed(range(len(deltas_SB))):
        following_B = np.where(mask_SB[t], deltas_SB[t] + rounded * following_B, 0)
        found_SB[t] = following_B
    return torch.from_numpy(found_SB).to(deltas_BS.device).t().contiguous()


class ValueSums(NamedTuple):
    """Of the tokens of one micro-batch, 0-d tensors; only `loss` carries a gradient."""

    loss: Tensor
    clipped: Tensor  # tokens whose value the clip held back
    squared_error: Tensor  # of the unclipped values
    tokens: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None = None,
) -> ValueSums:
    """max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2 per token, weighted and summed;
    `clip` None: plain squared error.

    The value clip is the one of PPO's published implementation, with the factors of DeepSpeed-Chat. All
    tensors have one shape.
    """
    values = torch.where(mask, values, 0.0)
    old_values = torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    free = (values - returns).square()
    worst, clipped = free, torch.zeros_like(mask)
    if clip is not None:
        bound = (
            torch.maximum(torch.minimum(values, old_values + clip), old_values - clip) - returns
        ).square()
        worst, clipped = torch.maximum(free, bound), bound > free
    return ValueSums(
        loss=weighted(worst, weights) / 2,
        clipped=clipped.sum(),
        squared_error=free.sum().detach(),
        tokens=mask.sum(),
    )


class PPO(ClippedPolicy):
    """Actor and critic learn; the KL to the reference is in the rewards or in the actor's loss."""

    trained = ("actor", "critic")
    sums: ClassVar = {
        "actor": ("clipped", "approx_kl", "tokens"),
        "critic": ("clipped", "squared_error", "tokens"),
    }

    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """Advantages and returns from rewards per token."""
        c = self.config
        assert experience.logprobs_BS is not None
        assert experience.values_BS is not None
        mask = experience.mask_BS.to(experience.logprobs_BS.device)
        kl = None
        if experience.ref_logprobs_BS is not None and c.kl.place == "reward":
            kl = token_kl(experience.logprobs_BS, experience.ref_logprobs_BS, c.kl.estimator)
        rewards = token_rewards(scores_B, kl, mask, kl_coef, c.reward_clip)
        advantages, returns = gae(rewards, experience.values_BS, mask, c.gamma, c.gae_lambda)
        if c.whiten:
            advantages = whiten(advantages, mask, moments(advantages, mask))
        return replace(experience, scores_B=scores_B, advantages_BS=advantages, returns_BS=returns)

    def inputs(self, role: str) -> Mapping[str, str]:
        """The critic learns returns from its old values."""
        if role == "critic":
            return {"values": "values_BS", "returns": "returns_BS"}
        return super().inputs(role)

    def loss(
        self,
        role: str,
        outputs: Outputs,
        inputs: Mapping[str, Tensor],
        weights_N: Tensor,
        kl_coef: float,
        responses: Responses | None = None,
    ) -> Loss:
        """The surrogate of the actor, the clipped squared error of the critic."""
        if role != "critic":
            return super().loss(role, outputs, inputs, weights_N, kl_coef, responses)
        assert outputs.values is not None
        found = value_loss(
            outputs.values,
            inputs["values"],
            inputs["returns"],
            torch.ones_like(outputs.values, dtype=torch.bool),
            clip=self.config.value_clip,
            weights=weights_N,
        )
        return Loss(found.loss, {name: getattr(found, name) for name in self.sums[role]})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Averages over the tokens of all steps."""
        tokens = sums["critic.tokens"]
        return {
            **super().metrics(sums),
            "value_clip_frac": sums["critic.clipped"] / tokens,
            "value_error": sums["critic.squared_error"] / tokens,
        }
