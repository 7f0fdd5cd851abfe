"""How token losses become the loss of a minibatch: the weight of each token (`algorithm.loss_average`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.config.algorithm import LossAverage
from puzzle.rlhf.experience import Experience


def token_weights(
    experience: Experience,
    minibatch: Sequence[Sequence[Sequence[int]]],
    part: Sequence[int],
    average: LossAverage,
    longest: int,
    device: torch.device,
) -> Tensor:
    """float32 (N,): what the loss of each token of the rows `part`, a micro-batch, is multiplied with.

    `minibatch` are the rows of every replica's micro-batches. Over all of them weights add up to 1, for
    `constant` to the share of responses x `longest` that are tokens. Fill has weight 0 and is in no count.
    """
    e = experience
    rows = e.counted([row for cut in minibatch for one in cut for row in one])
    own = e.counted(part)
    lengths_R = torch.tensor([e.tokens([row]) for row in part])
    if average == "sequence":
        divisors_R = len(rows) * lengths_R
    else:
        passes = sum(bool(e.counted(one)) for cut in minibatch for one in cut)
        divisor = {
            "token": e.tokens(rows),
            "constant": len(rows) * longest,
            "microbatch": passes * e.tokens(own),
        }[average]
        if len(own) == len(part):
            # Made on the device: a copy from the host would wait for it, once per micro-batch.
            return torch.full((e.tokens(part),), 1.0 / divisor, device=device)
        divisors_R = torch.full((len(part),), divisor)
    counts_R = torch.tensor([row in own for row in part])
    weights_R = torch.where(counts_R, 1.0 / divisors_R, 0.0)
    return weights_R.repeat_interleave(lengths_R).to(device)
