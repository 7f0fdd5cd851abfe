"""What supervised runs minimise: a loss of the final hidden states of some examples, and its metrics.

Losses are sums with weights that add up to 1 over a whole minibatch, so they do not depend on how it was cut
into micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from puzzle.config.supervised import SFTConfig, SupervisedConfig
from puzzle.data.examples import Example
from puzzle.data.masks import Labelled
from puzzle.model.decoder import Decoder
from puzzle.rlhf.algorithms.base import Loss


class Totals(NamedTuple):
    """Of all examples that a loss is the mean of: how many they are, and their learned tokens."""

    examples: int
    tokens: int

    @staticmethod
    def of(examples: Sequence[Example]) -> Totals:
        """Counted over all sequences."""
        return Totals(len(examples), sum(len(s.learned) for e in examples for s in e.sequences))


class Places(NamedTuple):
    """Where a micro-batch's outputs are read, ready on the device: R sequences, N learned tokens, one
    sequence after the other. Indices are of packed positions."""

    sequences: Sequence[Labelled]
    states_N: Tensor  # int64, the token before each learned one
    targets_N: Tensor  # int64, the learned ones
    last_R: Tensor  # int64, where sequences end


class Objective(ABC):
    """One loss with its options; stateless, so that every rank has an equal one."""

    sums: ClassVar[tuple[str, ...]]
    """What the loss adds up, beside `loss` itself."""

    @abstractmethod
    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """The weighted loss of one micro-batch, from final hidden states (T/tp, D), and sums for metrics."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What the sums over some examples say of them, beside their loss."""


class CrossEntropy(Objective):
    """The mean negative log-probability of learned tokens, each token alike or each example."""

    sums = ("tokens",)

    def __init__(self, config: SFTConfig) -> None:
        self.average = config.algorithm.loss_average

    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """Sum of -log p over learned tokens; weights 1 / tokens, or 1 / (examples x own tokens)."""
        logprobs_N = decoder.token_stats(hidden, places.states_N, places.targets_N).logprobs
        weight = 1.0 / totals.tokens
        weights_N: Tensor | float = weight
        if self.average == "sequence":
            counts_R = torch.tensor([len(s.learned) for s in places.sequences])
            weights_R = 1.0 / (totals.examples * counts_R)
            weights_N = weights_R.repeat_interleave(counts_R).to(logprobs_N.device)
        count = logprobs_N.new_full((), len(logprobs_N), dtype=torch.float64)
        return Loss(-(weights_N * logprobs_N).sum(), {"tokens": count})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Learned tokens."""
        return {"tokens": sums["tokens"]}


def make_objective(config: SupervisedConfig) -> Objective:
    """What a run is configured to learn."""
    made: dict[type, Any] = {SFTConfig: CrossEntropy}
    return made[type(config)](config)
