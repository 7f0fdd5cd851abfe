"""What the reference of PPO is asked for, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tests.reference.numpy_ppo import Ragged

Tokens = list[list[int]]


@dataclass(frozen=True)
class ReferenceConfig:
    """Everything that PPO depends on beyond models and prompts."""

    algorithm: str = "ppo"  # or one without a critic, of rows in groups of `samples`
    samples: int = 1
    max_new_tokens: int = 12
    eos_token_id: int | None = None
    temperature: float = 1.0
    kl_coef: float = 0.1
    kl_estimator: str = "k1"
    kl_place: str = "reward"  # or "loss"
    reference_free: bool = False
    score_clip: float = 5.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = False
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float = float("inf")
    ratio: str = "token"  # or "sequence"
    policy_loss: str = "clipped"  # or "cispo"
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0
    epochs: int = 1
    overlong: tuple[int, float] | None = None  # buffer, penalty
    minibatches: Callable[[int, int], list[list[int]]] | None = None  # (iteration, epoch) -> rows per step
    loss_average: str = (
        "token"  # "sequence": mean of rows' means; "constant"; "microbatch": of each `microbatch` rows'
    )
    microbatch: int = 1
    actor_lr: float = 1e-4
    critic_lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass
class Rollout:
    """What one iteration's answers lead to; ragged lists with one entry per answer token."""

    prompts: Tokens
    responses: Tokens
    scores: list[float]
    logprobs: Ragged
    ref_logprobs: Ragged | None
    values: Ragged | None
    rewards: Ragged | None
    advantages: Ragged
    returns: Ragged | None
    counted: int  # rows from here on are in no average
    correction: Ragged | None = None
    """Weights of the tokens' clipped objectives, not of their KL and entropy; None: all 1."""


@dataclass
class Step:
    """One optimizer step of the trained models. Gradients are those before clipping, by Hugging Face name."""

    rows: list[int]
    losses: dict[str, float]
    grads: dict[str, dict[str, Tensor]]
    grad_norms: dict[str, float]


@dataclass
class ReferenceResult:
    """One rollout per iteration, all steps in order, and the weights at the end by Hugging Face name."""

    rollouts: list[Rollout]
    steps: list[Step]
    actor_weights: dict[str, Tensor]
    critic_weights: dict[str, Tensor]
