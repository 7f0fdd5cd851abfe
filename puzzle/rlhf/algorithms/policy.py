"""What algorithms share: KL estimates, a policy's loss and the policy trained by it.

Functions take tensors of any one shape, packed (N,) as well as padded (B, S). Masks are boolean, True at
response tokens; what lies outside them may hold anything, NaN too, and reaches neither results nor gradients.

Losses are *weighted sums*: a token's own loss times its weight. Where the weights of a minibatch add up to 1,
over all micro-batches and replicas, its loss does not depend on how it was cut.

Sources: surrogates, `surrogate.py`; KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from puzzle.rlhf.algorithms.base import Algorithm, Loss, Outputs
from puzzle.rlhf.algorithms.surrogate import Responses, Surrogate

Estimator = Literal["k1", "k2", "k3"]


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Estimate KL(policy || reference) per token from tokens sampled by the policy (Schulman 2020).

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


class PolicySums(NamedTuple):
    """Of the tokens of one micro-batch, 0-d tensors; only `loss` carries a gradient."""

    loss: Tensor  # weighted: surrogate + kl_coef KL - entropy_coef entropy
    clipped: Tensor  # tokens whose ratio a clip held back
    approx_kl: Tensor  # k3 of KL(old policy || new policy)
    tokens: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: Surrogate,
    responses: Responses | None = None,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k2",
    correction: Tensor | None = None,
) -> PolicySums:
    """The surrogate's losses, and what is added to them: KL and an entropy bonus.

    All tensors have one shape; `weights` None: every token counts 1. `responses` are needed where the ratio
    is a response's. `entropy` (of the next-token distribution) gives the bonus of Schulman et al. 2017,
    equation 9; give `ref_logprobs` when the KL belongs into the loss and not into the rewards (as a loss, the
    gradient of k1 has expectation 0: prefer k2 or k3). `correction` (see `correction.correction_weights`)
    multiplies each token's surrogate, not its KL or entropy.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    inside = torch.where(mask, logprobs, 0.0)
    losses, held = surrogate.losses(inside, log_ratio, advantages, responses)
    if correction is not None:
        losses = losses * torch.where(mask, correction, 0.0)
    if ref_logprobs is not None:
        reference = torch.where(mask, ref_logprobs, 0.0)
        losses = losses + kl_coef * token_kl(inside, reference, kl_estimator)
    if entropy is not None:
        losses = losses - entropy_coef * torch.where(mask, entropy, 0.0)
    return PolicySums(
        loss=weighted(losses, weights),
        clipped=(held & mask).sum(),
        approx_kl=(torch.expm1(log_ratio) - log_ratio).sum().detach(),
        tokens=mask.sum(),
    )


def weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of token losses, each times its weight."""
    return losses.sum() if weights is None else (losses * weights).sum()


class ClippedPolicy(Algorithm):
    """A policy that learns alone by a surrogate of its ratios; what remains open is its advantages."""

    trained = ("actor",)
    sums: ClassVar = {"actor": ("clipped", "approx_kl", "tokens")}

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference is part of the policy's loss."""
        return self.config.kl.place == "loss" and not self.config.reference_free

    @property
    def wants_responses(self) -> bool:
        """The ratio of a response is made of all its tokens."""
        return self.config.ratio == "sequence"

    @property
    def surrogate(self) -> Surrogate:
        """The options' surrogate."""
        c = self.config
        return Surrogate(c.clip, c.clip_high, c.dual_clip, c.ratio, c.policy_loss)

    def inputs(self, role: str) -> Mapping[str, str]:
        """Old log-probs and advantages, the reference's log-probs where the loss has their KL, weights where
        what generation drew is corrected."""
        fields = {"old_logprobs": "logprobs_BS", "advantages": "advantages_BS"}
        if self.config.correction.kind != "none":
            fields["correction"] = "correction_BS"
        return {**fields, "ref_logprobs": "ref_logprobs_BS"} if self.kl_in_loss else fields

    def loss(
        self,
        role: str,
        outputs: Outputs,
        inputs: Mapping[str, Tensor],
        weights_N: Tensor,
        kl_coef: float,
        responses: Responses | None = None,
    ) -> Loss:
        """The options' surrogate with the options' KL and entropy."""
        assert outputs.logprobs is not None
        c = self.config
        found = policy_loss(
            outputs.logprobs,
            inputs["old_logprobs"],
            inputs["advantages"],
            weights_N > 0,
            surrogate=self.surrogate,
            responses=responses,
            weights=weights_N,
            entropy=outputs.entropy,
            entropy_coef=c.entropy,
            ref_logprobs=inputs.get("ref_logprobs"),
            kl_coef=kl_coef,
            kl_estimator=c.kl.estimator,
            correction=inputs.get("correction"),
        )
        return Loss(found.loss, {name: getattr(found, name) for name in self.sums[role]})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Averages over the tokens of all steps; 0 where none counted."""
        tokens = max(sums["actor.tokens"], 1.0)
        return {
            "clip_frac": sums["actor.clipped"] / tokens,
            "approx_kl": sums["actor.approx_kl"] / tokens,
        }
