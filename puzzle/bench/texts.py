"""Language-model losses over packed micro-batches, through the same calls as training by PPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.config.algorithm import AlgorithmConfig
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.stage import OutputFn
from puzzle.model.packing import PackedBatch, pack
from puzzle.rlhf.algorithms import make_algorithm
from puzzle.rlhf.algorithms.base import Outputs, total
from puzzle.rlhf.first_step import FirstStep


def next_tokens(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """int64: the packed positions that are followed by a token of their sequence, and those tokens."""
    inside = torch.ones(sum(batch.lengths), dtype=torch.bool)
    inside[torch.tensor(batch.lengths).cumsum(0) - 1] = False
    rows = inside.nonzero()[:, 0].to(batch.tokens_T.device)
    return rows, batch.tokens_T[rows + 1]


def microbatches(runtime: ModelRuntime, texts: Sequence[Sequence[int]], per_pass: int) -> list[PackedBatch]:
    """This replica's rows of `texts`, `per_pass` at a time."""
    mine = [texts[row] for row in runtime.rows(len(texts))]
    tp, device = runtime.placement.layout.tp, runtime.world.device
    return [pack(mine[i : i + per_pass], tp, device) for i in range(0, len(mine), per_pass)]


def random_batches(
    runtime: ModelRuntime, count: int, rows: int, length: int
) -> tuple[int, list[PackedBatch]]:
    """`count` micro-batches of `rows` random texts; and how many texts all replicas have together."""
    total = count * rows * runtime.placement.layout.dp
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, runtime.spec.vocab_size, (total, length), generator=generator)
    return total, microbatches(runtime, texts.tolist(), rows)


def token_logprobs(runtime: ModelRuntime, batches: Sequence[PackedBatch]) -> OutputFn:
    """Log-probabilities of every next token of a micro-batch."""
    wanted = [next_tokens(batch) for batch in batches]
    return lambda index, hidden: runtime.decoder.token_stats(hidden, *wanted[index]).logprobs


def mean_loss(runtime: ModelRuntime, batches: Sequence[PackedBatch], total: int) -> OutputFn:
    """A micro-batch's share of the mean loss over `total` next tokens of all micro-batches and replicas."""
    logprobs = token_logprobs(runtime, batches)
    return lambda index, hidden: -logprobs(index, hidden).sum() / total


def ppo_loss(runtime: ModelRuntime, batches: Sequence[PackedBatch]) -> OutputFn:
    """The surrogate of PPO's actor at every next token, with all that its trainer notes of it; of advantages
    and log-probabilities that are 0."""
    algorithm, first = make_algorithm(AlgorithmConfig()), FirstStep(runtime.world)
    wanted = [next_tokens(batch) for batch in batches]
    given = [
        {name: torch.zeros(len(rows)).to(rows.device) for name in (*algorithm.inputs("actor"), "weights")}
        for rows, _ in wanted
    ]

    def loss(index: int, hidden: Tensor) -> Tensor:
        fields = dict(given[index])
        weights = fields.pop("weights")
        stats = runtime.decoder.token_stats(hidden, *wanted[index], entropy=algorithm.wants_entropy)
        found = algorithm.loss("actor", Outputs(stats.logprobs, stats.entropy), fields, weights, 0.1)
        for value in (found.loss, *found.sums.values()):
            total(value)
        first.note(stats.logprobs.detach(), weights, weights, found.sums.get("clipped"))
        return found.loss

    return loss


def mean_square_value(runtime: ModelRuntime, batches: Sequence[PackedBatch], total: int) -> OutputFn:
    """A micro-batch's share of the mean squared value of `total` states that are followed by a token."""
    rows = [next_tokens(batch)[0] for batch in batches]
    return lambda index, hidden: runtime.decoder.values(hidden)[rows[index]].square().sum() / total


def last_values(runtime: ModelRuntime, batches: Sequence[PackedBatch]) -> OutputFn:
    """The value of every sequence's last state."""
    return lambda index, hidden: runtime.decoder.values(hidden)[batches[index].last_rows]
