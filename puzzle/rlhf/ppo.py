"""PPO as pure functions of torch tensors; needs nothing but torch.

Two shapes occur. *Rollout* functions (rewards, GAE) take right-padded (B, S) tensors: column k belongs to
answer token k, its log-prob, and the value of the state before it. *Loss* functions work token by token and
take tensors of any one shape, packed (T,) as well as padded (B, S). Masks are boolean, True at answer
tokens; what lies outside them may hold anything, NaN too, and reaches neither results nor gradients.

Losses and statistics are *sums*. Divide by the number of answer tokens of the whole minibatch (`mask.sum()`
over all micro-batches and replicas) for token-weighted averages: then results do not depend on how the
minibatch was cut. The averaging of published systems, a mean of micro-batch means, is the same sum divided
by each micro-batch's own token count.

Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347); GAE, Schulman et al. 2016 (arXiv:1506.02438); KL
estimators, Schulman 2020 (joschu.net/blog/kl-approx.html); rewards of language models and the adaptive KL
coefficient, Ziegler et al. 2019 (arXiv:1909.08593); details of rewards and losses as in DeepSpeed-Chat (Yao
et al. 2023, arXiv:2308.01320).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
WHITEN_EPS = 1e-8


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Estimate KL(policy || reference) per token from tokens drawn by the policy (Schulman 2020).

    With r = exp(ref_logprobs - logprobs): k1 = -log r (unbiased, may be negative), k2 = (log r)^2 / 2
    (biased, low variance; as a loss it has the gradient of the true KL), k3 = (r - 1) - log r (unbiased,
    never negative). Any shape, kept.
    """
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return torch.expm1(log_r) - log_r
    raise ValueError(f"KL estimator {estimator!r} is none of k1, k2, k3")


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
    limited_B = scores_B if score_clip is None else scores_B.clamp(-score_clip, score_clip)
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
        advantages_BS = torch.zeros_like(values_BS)
        following_B = values_BS.new_zeros(values_BS.shape[0])
        next_value_B = torch.zeros_like(following_B)
        for t in reversed(range(values_BS.shape[1])):
            delta_B = rewards_BS[:, t] + gamma * next_value_B - values_BS[:, t]
            following_B = torch.where(mask_BS[:, t], delta_B + gamma * lam * following_B, 0.0)
            advantages_BS[:, t] = following_B
            next_value_B = values_BS[:, t]
        return advantages_BS, advantages_BS + values_BS


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: sum, sum of squares and count of x inside the mask. Add them over replicas before
    `whiten`.
    """
    inside = torch.where(mask, x, 0.0).double()
    return torch.stack([inside.sum(), inside.square().sum(), mask.sum().double()])


def whiten(x: Tensor, mask: Tensor, moments_3: Tensor) -> Tensor:
    """Bring the mean and variance of the whole batch (from `moments`) to 0 and 1; 0 outside the mask.

    (x - mean) / sqrt(var + 1e-8), var divided by the count: advantage normalisation of PPO implementations.
    """
    total, squares, count = moments_3.tolist()
    if count == 0:
        return torch.zeros_like(x)
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    return torch.where(mask, (x - mean) / (variance + WHITEN_EPS) ** 0.5, 0.0)


class ActorSums(NamedTuple):
    """Sums over the answer tokens of one micro-batch: 0-d tensors; only `loss` carries a gradient."""

    loss: Tensor  # policy + kl_coef KL - entropy_coef entropy; what to differentiate
    policy: Tensor  # the clipped surrogate alone
    clipped: Tensor  # tokens whose ratio the clip held back
    approx_kl: Tensor  # k3 of KL(old policy || new policy)
    kl: Tensor  # of KL(policy || reference); 0 without one
    entropy: Tensor  # 0 when not given
    tokens: Tensor


def actor_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k2",
) -> ActorSums:
    """Clipped surrogate max(-A rho, -A clip(rho, 1-clip, 1+clip)), rho = exp(new - old) (Schulman et al.
    2017, equation 7).

    All tensors have one shape. `entropy` (of the next-token distribution) gives the bonus of equation 9;
    give `ref_logprobs` when the KL belongs into the loss and not into the rewards (as a loss, the gradient
    of k1 has expectation 0: prefer k2 or k3).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(free, bound).sum()
    zero = torch.zeros_like(policy).detach()
    bonus = zero if entropy is None else torch.where(mask, entropy, 0.0).sum()
    kl = zero
    if ref_logprobs is not None:
        inside, reference = torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0)
        kl = token_kl(inside, reference, kl_estimator).sum()
    loss = policy + kl_coef * kl - entropy_coef * bonus
    return ActorSums(
        loss=loss,
        policy=policy.detach(),
        clipped=(bound > free).sum(),
        approx_kl=(torch.expm1(log_ratio) - log_ratio).sum().detach(),
        kl=kl.detach(),
        entropy=bonus.detach(),
        tokens=mask.sum(),
    )


class CriticSums(NamedTuple):
    """Sums over the answer tokens of one micro-batch: 0-d tensors; only `loss` carries a gradient."""

    loss: Tensor
    clipped: Tensor  # tokens whose value the clip held back
    squared_error: Tensor  # of the unclipped values
    tokens: Tensor


def critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> CriticSums:
    """max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2, summed; `clip` None: plain squared
    error.

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
    return CriticSums(
        loss=worst.sum() / 2, clipped=clipped.sum(), squared_error=free.sum().detach(), tokens=mask.sum()
    )


def adapted_kl_coef(coef: float, observed: float, target: float, responses: int, horizon: int) -> float:
    """The next KL coefficient of a controller that is proportional in log space (Ziegler et al. 2019,
    section 2.2).

    `observed` and `target` are KL in nats per response; an error of 20 % or more changes the coefficient by
    20 % every `horizon` responses.
    """
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * responses / horizon)


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores so far: three numbers to save and to resume
    from.

    Merging follows Chan, Golub and LeVeque 1983, so the state does not depend on how scores came in
    batches.
    """

    count: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    def merged(self, moments_3: Tensor) -> RunningMoments:
        """The state after a batch with these `moments` (already added over replicas)."""
        total, squares, count = moments_3.tolist()
        if count == 0:
            return self
        both = self.count + count
        shift = total / count - self.mean
        deviations = max(squares - total**2 / count, 0.0)
        return RunningMoments(
            count=both,
            mean=self.mean + shift * count / both,
            deviations=self.deviations + deviations + shift**2 * self.count * count / both,
        )

    def scaled(self, scores: Tensor) -> Tensor:
        """Scores divided by the running standard deviation; unchanged while fewer than two distinct ones
        were seen.
        """
        if self.deviations <= 0.0:
            return scores
        return scores / (self.deviations / self.count + WHITEN_EPS) ** 0.5
