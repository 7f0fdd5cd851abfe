"""Soft punishment of long responses (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.config.run import TrainConfig
from puzzle.rlhf.experience import Experience


def overlong_rewards(experience: Experience, config: TrainConfig) -> Tensor | None:
    """float32 (B,) on the CPU, what is added to scores; None where that was not asked for.

    0 up to `generation.max_new_tokens` - buffer tokens, from there falling by the same with every token to
    -penalty at max_new_tokens: equation 13.
    """
    options, longest = config.algorithm.overlong, config.generation.max_new_tokens
    if options is None:
        return None
    lengths_B = torch.tensor([len(response) for response in experience.responses])
    beyond_B = (lengths_B - (longest - options.buffer)).clamp(0, options.buffer)
    return -options.penalty * beyond_B / options.buffer


def shaped(experience: Experience, scores_B: Tensor, config: TrainConfig) -> Tensor:
    """float32 (B,): the scores, less what overlong responses cost."""
    rewards_B = overlong_rewards(experience, config)
    return scores_B if rewards_B is None else scores_B + rewards_B.to(scores_B.device)


def overlong_metrics(experience: Experience, config: TrainConfig) -> dict[str, float]:
    """The mean over responses, and the share of responses that it reached."""
    rewards_B = overlong_rewards(experience, config)
    if rewards_B is None:
        return {}
    reached_B = rewards_B < 0
    return {
        "overlong_reward": float(rewards_B.double().mean()),
        "overlong_frac": float(reached_B.double().mean()),
    }
