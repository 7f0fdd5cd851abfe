"""What supervised runs minimise: a loss of the final hidden states of some examples, and its metrics.

Losses are sums with weights that add up to 1 over a whole minibatch, so they do not depend on how it was cut
into micro-batches. Suffixes: R sequences of a micro-batch, N their learned tokens, P pairs (R = 2 P, the
preferred one first).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.config.supervised import DPOConfig, RewardModelConfig, SFTConfig, SupervisedConfig
from puzzle.data.examples import Example
from puzzle.model.decoder import Decoder
from puzzle.rlhf.algorithms.base import Loss, total
from puzzle.rlhf.algorithms.surrogate import Responses


class Totals(NamedTuple):
    """Of all examples that a loss is the mean of: how many they are, and their learned tokens."""

    examples: int
    tokens: int

    @staticmethod
    def of(examples: Sequence[Example]) -> Totals:
        """Counted over all sequences."""
        return Totals(len(examples), sum(len(s.learned) for e in examples for s in e.sequences))


class Places(NamedTuple):
    """Where the outputs of a micro-batch are read, and what its examples say, ready on the device. Indices
    are of packed positions."""

    states_N: Tensor  # int64, the token before each learned one
    targets_N: Tensor  # int64, the learned ones
    last_R: Tensor  # int64, where sequences end
    learned: Responses  # which learned tokens belong to one sequence
    margins: Tensor  # float32, one per example
    reference: Tensor  # float64, one per sequence where the loss needs it


class Objective(ABC):
    """One loss with its options; stateless, so that every rank has an equal one."""

    sums: ClassVar[tuple[str, ...]]
    """What the loss adds up, beside `loss` itself."""
    wants_reference: ClassVar[bool] = False
    """Whether it needs `Example.reference`."""

    @abstractmethod
    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """The weighted loss of one micro-batch, from final hidden states (T/tp, D), and sums for metrics."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What the sums over some examples say of them, beside their loss."""


def logprobs_N(decoder: Decoder, hidden: Tensor, places: Places) -> Tensor:
    """float32 (N,): log-probabilities of the learned tokens."""
    return decoder.token_stats(hidden, places.states_N, places.targets_N).logprobs


def logprobs_R(decoder: Decoder, hidden: Tensor, places: Places) -> Tensor:
    """float64 (R,): of all learned tokens of a sequence together."""
    return places.learned.sums(logprobs_N(decoder, hidden, places))


class CrossEntropy(Objective):
    """The mean negative log-probability of learned tokens, each token alike or each example."""

    sums = ("tokens",)

    def __init__(self, config: SFTConfig) -> None:
        self.average = config.algorithm.loss_average

    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """Sum of -log p over learned tokens; weights 1 / tokens, or 1 / (examples x own tokens)."""
        found_N = logprobs_N(decoder, hidden, places)
        count = found_N.new_full((), len(found_N), dtype=torch.float64)
        if self.average == "token":
            return Loss(-found_N.sum() / totals.tokens, {"tokens": count})
        means_R = places.learned.sums(found_N) / places.learned.lengths_R
        return Loss(-means_R.sum() / totals.examples, {"tokens": count})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Learned tokens."""
        return {"tokens": sums["tokens"]}


def pair_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Of scores of pairs: the share in which the preferred one has more, half the width of its 95 % interval
    (Wilson 1927, which has one at 0 and 1, too), and by how much on average."""
    pairs, squared = sums["pairs"], 1.96**2
    share = sums["right"] / pairs
    spread = share * (1 - share) / pairs + squared / (4 * pairs**2)
    return {
        "accuracy": share,
        "accuracy_ci95": 1.96 * spread**0.5 / (1 + squared / pairs),
        "score_gap": sums["gap"] / pairs,
    }


def pair_sums(scores_R: Tensor) -> dict[str, Tensor]:
    """What `pair_metrics` reads: equal scores are half right."""
    gap_P = (scores_R[0::2] - scores_R[1::2]).detach().double()
    right = (gap_P > 0).double() + 0.5 * (gap_P == 0).double()
    return {"pairs": gap_P.new_full((), len(gap_P)), "right": right.sum(), "gap": gap_P.sum()}


class BradleyTerry(Objective):
    """-log sigmoid(preferred score - other score - margin), the mean over pairs.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the margin, Touvron et al. 2023
    (arXiv:2307.09288), equation 2.
    """

    sums = ("pairs", "right", "gap", "score")

    def __init__(self, config: RewardModelConfig) -> None:
        """It has no options."""

    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """A sequence's score is the head's output at its last token."""
        scores_R = decoder.values(hidden)[places.last_R]
        gap_P = scores_R[0::2] - scores_R[1::2] - places.margins
        sums = {**pair_sums(scores_R), "score": total(scores_R)}
        return Loss(-F.logsigmoid(gap_P).sum() / totals.examples, sums)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Also the mean score of all answers."""
        return {**pair_metrics(sums), "score": sums["score"] / (2 * sums["pairs"])}


class DPO(Objective):
    """-log sigmoid of beta times the difference of log-ratios to the reference, the mean over pairs.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; with the share e of pairs taken to be the
    wrong way round (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), (1 - e) of it and e of the opposite.
    """

    sums = ("pairs", "right", "gap", "chosen", "rejected", "tokens")
    wants_reference = True

    def __init__(self, config: DPOConfig) -> None:
        self.beta, self.wrong = config.algorithm.beta, config.algorithm.label_smoothing

    def loss(self, decoder: Decoder, hidden: Tensor, places: Places, totals: Totals) -> Loss:
        """The reward of a sequence is beta times its log-ratio to the reference."""
        found_R = logprobs_R(decoder, hidden, places)
        rewards_R = self.beta * (found_R - places.reference)
        chosen_P, rejected_P = rewards_R[0::2], rewards_R[1::2]
        gap_P = chosen_P - rejected_P
        losses_P = -(1 - self.wrong) * F.logsigmoid(gap_P) - self.wrong * F.logsigmoid(-gap_P)
        sums = {**pair_sums(rewards_R), "chosen": total(chosen_P), "rejected": total(rejected_P)}
        sums["tokens"] = gap_P.new_full((), len(places.targets_N))
        return Loss(losses_P.sum() / totals.examples, sums)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Also the mean implicit rewards of both, and learned tokens."""
        both = {f"{name}_reward": sums[name] / sums["pairs"] for name in ("chosen", "rejected")}
        return {**pair_metrics(sums), **both, "tokens": sums["tokens"]}


def make_objective(config: SupervisedConfig) -> Objective:
    """What a run is configured to learn."""
    if isinstance(config, SFTConfig):
        return CrossEntropy(config)
    if isinstance(config, RewardModelConfig):
        return BradleyTerry(config)
    assert isinstance(config, DPOConfig), "one of the three"
    return DPO(config)
