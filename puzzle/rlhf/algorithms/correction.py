"""Importance weights for tokens that generation drew by other log-probs than training computes.

Generation and training run other kernels and round differently, so the policy that sampled is not quite the
one that learns. rho = exp(log-prob of the training forward before the step - log-prob of generation) says by
how much; the policy's loss of a token is multiplied by a weight made of it.

Sources: truncated importance sampling, Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training"); masking outside of a band, IcePop (Ling Team 2025, arXiv:2510.18855).
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.config.algorithm import CorrectionConfig
from puzzle.rlhf.experience import Experience


def correction_weights(
    logprobs_BS: Tensor, sampled_logprobs_BS: Tensor, mask_BS: Tensor, config: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    """float32 (B, S) weights, 0 outside the mask, and bool (B, S): which tokens were truncated or masked.

    By token, or by the product over the tokens of a response, which all of them get: `truncate` gives
    min(rho, cap); `mask` rho within [low, high] and 0 beyond. No gradient flows.
    """
    log_rho_BS = torch.where(mask_BS, (logprobs_BS - sampled_logprobs_BS).detach().double(), 0.0)
    if config.level == "sequence":
        log_rho_BS = log_rho_BS.sum(1, keepdim=True).expand_as(log_rho_BS)
    rho_BS = log_rho_BS.exp()
    if config.kind == "truncate":
        held_BS = rho_BS > config.cap
        weights_BS = rho_BS.clamp(max=config.cap)
    else:
        held_BS = (rho_BS < config.low) | (rho_BS > config.high)
        weights_BS = torch.where(held_BS, 0.0, rho_BS)
    return torch.where(mask_BS, weights_BS, 0.0).float(), held_BS & mask_BS


def corrected(experience: Experience, config: CorrectionConfig) -> tuple[Tensor | None, dict[str, float]]:
    """`correction_BS` of an experience with recomputed log-probs, and metrics over all its tokens: the share
    truncated or masked, and the mean weight. Nothing where nothing is corrected."""
    if config.kind == "none":
        return None, {}
    assert experience.logprobs_BS is not None
    assert experience.sampled_logprobs_BS is not None
    mask_BS = experience.mask_BS.to(experience.logprobs_BS.device)
    pair = (experience.logprobs_BS, experience.sampled_logprobs_BS)
    weights_BS, held_BS = correction_weights(*pair, mask_BS, config)
    tokens = float(mask_BS.sum())
    return weights_BS, {
        "correction_frac": float(held_BS.sum()) / tokens,
        "correction_weight": float(weights_BS.double().sum()) / tokens,
    }
