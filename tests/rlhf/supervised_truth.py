"""Losses of supervised training on transformers, a sequence at a time, without the project's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

Row = tuple[tuple[int, ...], tuple[int, int]]
"""Tokens, and the half-open interval of those that are learned."""


def logprobs(model: Any, row: Row) -> Tensor:
    """float32: log-probabilities of the learned tokens of one sequence."""
    tokens, (start, stop) = row
    logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    every = F.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return every[max(1, start) - 1 : stop - 1]


def cross_entropy(model: Any, examples: Sequence[Sequence[Row]], average: str) -> Tensor:
    """Over all learned tokens, or the mean of examples' means."""
    own = [-logprobs(model, row) for (row,) in examples]
    return torch.cat(own).mean() if average == "token" else torch.stack([x.mean() for x in own]).mean()


def score(model: Any, row: Row) -> Tensor:
    """The classifier's output at the last token of one sequence."""
    model.config.pad_token_id = None
    return model(torch.tensor([row[0]])).logits[0, 0]


def bradley_terry(model: Any, pairs: Sequence[Sequence[Row]], margins: Sequence[float]) -> Tensor:
    """-log sigmoid of the scores' difference less the margin, the mean over pairs."""
    gaps = [score(model, a) - score(model, b) - m for (a, b), m in zip(pairs, margins, strict=True)]
    return -torch.stack([F.logsigmoid(gap) for gap in gaps]).mean()


def dpo(model: Any, before: Any, pairs: Sequence[Sequence[Row]], beta: float, wrong: float) -> Tensor:
    """The mean over pairs of Rafailov et al.'s loss with a share of pairs the wrong way round."""
    losses = []
    for a, b in pairs:
        with torch.no_grad():
            known = logprobs(before, a).sum() - logprobs(before, b).sum()
        gap = beta * (logprobs(model, a).sum() - logprobs(model, b).sum() - known)
        losses.append((wrong - 1) * F.logsigmoid(gap) - wrong * F.logsigmoid(-gap))
    return torch.stack(losses).mean()


def gradients(model: Any, loss: Callable[[Any], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient of every parameter by name."""
    value = loss(model)
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(value.detach()), found


def causal(folder: Path) -> Any:
    """The language model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def classifier(folder: Path) -> Any:
    """The reward model of a folder."""
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
