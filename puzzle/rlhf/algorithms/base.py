"""The seam between the engine and an algorithm: who is trained, on which advantages, by which loss.

An iteration, as every algorithm has it:

    rollout -> what each role computes about the responses -> advantages -> minibatches of loss and step
               (`INFERRED`)                                   (`advantages`)               (`loss`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from puzzle.config.algorithm import AlgorithmConfig
from puzzle.rlhf.algorithms.surrogate import Responses
from puzzle.rlhf.experience import Experience

INFERRED: Mapping[str, str] = {
    "actor": "logprobs_BS",
    "reference": "ref_logprobs_BS",
    "critic": "values_BS",
    "reward": "scores_B",
}
"""What the pass of a role in inference fills in of an experience, in the order in which they run."""


class Outputs(NamedTuple):
    """What a trained model says of N response tokens, float32 (N,): an LM head log-probs (and entropies where
    the loss wants them), a value head values."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None


class Loss(NamedTuple):
    """The loss of one micro-batch, 0-d with a gradient, and sums over its tokens by name, 0-d without one.

    `sums` are added over micro-batches, steps and replicas before `Algorithm.metrics` reads them.
    """

    loss: Tensor
    sums: Mapping[str, Tensor]


class Algorithm(ABC):
    """One algorithm with its options; stateless, so that every rank has an equal one."""

    trained: ClassVar[tuple[str, ...]]
    """Roles with an optimizer; the policy, which generates, first."""
    sums: ClassVar[Mapping[str, tuple[str, ...]]]
    """What the loss of each trained role adds up, beside `loss` itself."""
    wants_greedy: ClassVar[bool] = False
    """Whether advantages need the scores of greedy responses (`greedy_scores_P`)."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    @property
    def wants_entropy(self) -> bool:
        """Whether the policy's loss needs the entropy of every token's distribution."""
        return self.config.entropy > 0

    @property
    def wants_responses(self) -> bool:
        """Whether losses need to know which tokens of a micro-batch are one response."""
        return False

    @abstractmethod
    def advantages(self, experience: Experience, scores_B: Tensor, kl_coef: float) -> Experience:
        """The experience with `scores_B` (float32, one score per row), advantages, and what else the losses
        take."""

    @abstractmethod
    def inputs(self, role: str) -> Mapping[str, str]:
        """What a role's loss takes per token: name -> the (B, S) field of the experience."""

    @abstractmethod
    def loss(
        self,
        role: str,
        outputs: Outputs,
        inputs: Mapping[str, Tensor],
        weights_N: Tensor,
        kl_coef: float,
        responses: Responses | None = None,
    ) -> Loss:
        """The loss of one micro-batch of a role: the sum over tokens of each one's own loss times its weight.

        `inputs` are float32 (N,) by the names of `inputs(role)`, `responses` theirs if `wants_responses`; a
        response is never cut over micro-batches. Weights add up to 1 over all micro-batches
        and replicas, so the sum over them is the loss of the minibatch however it was cut.
        """

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """An iteration's metrics from the sums of all its losses, by "role.name"."""


def total(x: Tensor) -> Tensor:
    """The sum without a gradient, float64."""
    return x.detach().sum(dtype=torch.float64)
