"""The section `algorithm` of a run's configuration: what the run learns by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from puzzle.config.sections import Count, Fraction, NonNegative, Positive, Section, Sequences, Tokens
from puzzle.files.limits import LARGEST

UNDISCOUNTED = ("grpo", "dr_grpo", "rloo")
"""Algorithms whose advantages are responses', whatever their length."""
COMPARING = (*UNDISCOUNTED, "reinforce_pp_baseline")
"""Algorithms that compare the samples of a prompt."""


LossAverage = Literal["token", "sequence", "constant", "microbatch"]


class KLConfig(Section):
    """KL penalty against the reference; adaptive towards `target` as in Ziegler et al. 2019, section 2.2."""

    coef: NonNegative = Field(0.1, description="weight of the penalty; the first one where it adapts")
    target: Positive | None = Field(None, description="adapt coef towards this KL per response; null: fixed")
    horizon: Count = Field(10000, description="responses over which an adaptive coef reacts")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="http://joschu.net/blog/kl-approx.html")
    place: Literal["reward", "loss"] = Field(
        "reward", description="loss: with k2 or k3, as the gradient of k1 is 0 on average"
    )

    @model_validator(mode="after")
    def _can_adapt(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("target: a coef of 0 is changed in proportion, so never; start above 0")
        return self


class CorrectionConfig(Section):
    """Weights for tokens whose log-prob training finds other than generation did: rho = exp(recomputed -
    generation's) multiplies the policy's loss (docs/generation.md)."""

    kind: Literal["none", "truncate", "mask"] = Field(
        "none", description="truncate: min(rho, cap); mask: rho within low and high, 0 beyond"
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="sequence: the product over a response's tokens weighs all of them"
    )
    cap: Positive = Field(2.0, description="of truncate, 1 or more")
    low: Positive = Field(0.5, description="of mask, below 1")
    high: Positive = Field(5.0, description="of mask, above 1")

    @model_validator(mode="after")
    def _sense(self) -> CorrectionConfig:
        used = {"none": (), "truncate": ("level", "cap"), "mask": ("level", "low", "high")}[self.kind]
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for name in ("level", "cap", "low", "high"):
            if name not in used and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}: kind {self.kind} has no use for it; leave it out")
        if self.cap < 1:
            raise ValueError(f"cap {self.cap:g} would hold back tokens whose log-probs agree; give 1 or more")
        if not self.low < 1 < self.high:
            raise ValueError(
                f"low {self.low:g} and high {self.high:g} would mask tokens whose log-probs agree; give low"
                " below 1 and high above 1"
            )
        return self


class OverlongConfig(Section):
    """A penalty for responses near `generation.max_new_tokens` (DAPO, Yu et al. 2025, section 3.4)."""

    buffer: Tokens = Field(description="the last so many tokens are penalised, more with each of them")
    penalty: Positive = Field(1.0, description="taken from the score of a response of max_new_tokens")


class DynamicSamplingConfig(Section):
    """Groups of equal scores teach nothing and are replaced (DAPO, Yu et al. 2025, section 3.2)."""

    rounds: Annotated[int, Field(ge=1, le=100)] = Field(
        description="most times that another batch of prompts is drawn for them in an iteration"
    )


class PassesConfig(Section):
    """How the rows of an optimizer step are cut into forward and backward passes."""

    microbatch: Sequences | None = Field(None, description="sequences per forward and backward pass")
    microbatch_tokens: Count | None = Field(
        None, description="tokens per pass instead of sequences; default: docs/memory.md"
    )
    balance: bool = Field(
        True, description="rows go to replicas by length, evenly in tokens; false for loss_average microbatch"
    )
    packing: bool = Field(True, description="false: pad the sequences of a pass to its longest")

    @model_validator(mode="after")
    def _one_unit(self) -> PassesConfig:
        if self.microbatch is not None and self.microbatch_tokens is not None:
            raise ValueError("give microbatch or microbatch_tokens, not both")
        if self.microbatch_tokens is not None and not self.packing:
            raise ValueError("packing false pads passes beyond microbatch_tokens; give microbatch")
        return self


class AlgorithmConfig(PassesConfig):
    """What a run learns by: `ppo` (Schulman et al. 2017) with a critic; without one, on groups of
    `generation.samples`: `grpo` (Shao et al. 2024), `dr_grpo` (Liu et al. 2025), `rloo` (Ahmadian et al.
    2024) and `reinforce_pp_baseline` (Hu 2025); on any number of samples: `reinforce_pp` (Hu 2025) and
    `remax` (Li et al. 2023). Their defaults differ in `kl`, `reward_clip` and `loss_average`
    (docs/algorithms.md)."""

    name: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax"] = Field(
        "ppo", description="all but ppo train the actor alone (docs/algorithms.md)"
    )
    epochs: Count = Field(1, description="passes over the batch in one iteration")
    minibatch: Sequences | None = Field(None, description="sequences per optimizer step; default: all")
    policy_loss: Literal["clipped", "cispo"] = Field(
        "clipped", description="cispo: clipped ratios weigh log-probs, so that no token's gradient is lost"
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="sequence: one ratio per response, the geometric mean of its tokens' (GSPO)"
    )
    clip: Positive = Field(0.2, description="how far the probability ratio may leave 1")
    clip_high: Positive | None = Field(None, description="how far it may rise above 1; null: as clip")
    dual_clip: Annotated[float, Field(gt=1, le=LARGEST)] | None = Field(
        None, description="most that the ratio counts where the advantage is negative; null: any"
    )
    value_clip: Positive | None = Field(0.2, description="how far a value may leave the old one; null: any")
    gamma: Fraction = Field(1.0, description="discount per token")
    gae_lambda: Fraction = Field(0.95, description="of generalised advantage estimation")
    kl: KLConfig = KLConfig()
    kl_stop: Positive | None = Field(None, description="end the run when KL per token exceeds this")
    whiten: bool = Field(False, description="advantages to mean 0, variance 1 over the batch's tokens")
    reward_clip: Positive | None = Field(5.0, description="scores are clamped to +- this; null: not")
    reward_norm: bool = Field(False, description="divide scores by their running standard deviation")
    entropy: NonNegative = Field(0.0, description="coefficient of the entropy bonus")
    reference_free: bool = Field(False, description="no reference model and no KL penalty")
    old_logprobs: Literal["generation", "recompute"] = Field(
        "generation", description="where the policy before the step comes from; recompute: one more pass"
    )
    correction: CorrectionConfig = CorrectionConfig()
    overlong: OverlongConfig | None = None
    dynamic_sampling: DynamicSamplingConfig | None = None
    loss_average: LossAverage = Field(
        "token",
        description="tokens count alike; sequence: responses do; constant: sums over max_new_tokens;"
        " microbatch: mean of means",
    )

    @model_validator(mode="after")
    def _means(self) -> AlgorithmConfig:
        if self.balance and self.loss_average == "microbatch":
            raise ValueError(
                "balance would change the loss of loss_average microbatch, a mean over micro-batches as they"
                " are cut; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_bound(self) -> AlgorithmConfig:
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise ValueError("dual_clip: policy_loss cispo bounds every weight by clip_high; leave it out")
        return self

    @model_validator(mode="after")
    def _two_log_probs(self) -> AlgorithmConfig:
        if self.correction.kind != "none" and self.old_logprobs == "generation":
            raise ValueError(
                "correction needs old_logprobs recompute: with generation's log-probs as the old ones, the"
                " ratio of the loss holds what would be corrected already"
            )
        return self

    @model_validator(mode="after")
    def _drops_groups(self) -> AlgorithmConfig:
        if self.dynamic_sampling is not None and self.name not in COMPARING:
            raise ValueError(
                f"dynamic_sampling: {self.name} learns from equal scores, too; leave it out, or take"
                f" {', '.join(COMPARING)}"
            )
        return self

    @model_validator(mode="after")
    def _idle(self) -> AlgorithmConfig:
        if self.name == "ppo":
            return self
        idle = ["value_clip", "gae_lambda", "whiten", *(["gamma"] if self.name in UNDISCOUNTED else [])]
        given = [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{given[0]}: {self.name} has no critic and no use for it; leave it out")
        return self
