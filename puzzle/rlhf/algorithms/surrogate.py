"""Surrogate losses of a policy: what a token's probability ratio and advantage make of its loss.

Sources: the clip, Schulman et al. 2017 (arXiv:1707.06347), equation 7; one bound below and another above,
DAPO, Yu et al. 2025 (arXiv:2503.14476), section 3.1; the dual clip, Ye et al. 2019 (arXiv:1912.09729),
equation 5; one ratio for a response, GSPO, Zheng et al. 2025 (arXiv:2507.18071), section 4; clipped
importance weights, CISPO of MiniMax-M1 (arXiv:2506.13585), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Responses(NamedTuple):
    """Which of N packed tokens belong together: R responses, one after the other."""

    rows_N: Tensor  # int64, the response of each token
    columns_N: Tensor  # int64, its place in it
    lengths_R: Tensor  # float64
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Responses:
        """Of responses of these lengths, each at least 1."""
        lengths_R = torch.tensor(lengths)
        mask_RS = torch.arange(max(lengths)) < lengths_R[:, None]
        rows_N, columns_N = (index.to(device) for index in mask_RS.nonzero().unbind(1))
        return Responses(rows_N, columns_N, lengths_R.double().to(device), max(lengths))

    def sums(self, x_N: Tensor) -> Tensor:
        """float64 (R,): the sum of each response. Bitwise the same every time."""
        table_RS = x_N.new_zeros((len(self.lengths_R), self.longest), dtype=torch.float64)
        table_RS[self.rows_N, self.columns_N] = x_N.double()
        return table_RS.sum(1)

    def mean(self, x_N: Tensor) -> Tensor:
        """(N,), the dtype of x: the mean of each token's response. Bitwise the same every time."""
        return (self.sums(x_N) / self.lengths_R)[self.rows_N].to(x_N.dtype)


class Surrogate(NamedTuple):
    """A surrogate with its options. `high` None: as `low`; `dual` None: no dual clip."""

    low: float
    high: float | None = None
    dual: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    kind: Literal["clipped", "cispo"] = "clipped"

    def losses(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, responses: Responses | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token losses, and which tokens (bool) a clip held back; all tensors of one shape.

        `clipped`: max(-A rho, -A clip(rho, 1 - low, 1 + high)), where A < 0 at most -A dual. `cispo`:
        -A sg(clip(rho, 1 - low, 1 + high)) logprob: a token beyond the clip still learns, with the weight of
        the clip. rho is exp(`log_ratio`), new less old log-probs; by `sequence`, the geometric mean over a
        response (`responses`) takes its place, and each token's gradient is its own: GSPO-token, whose losses
        and gradients are those of GSPO where the advantages of a response's tokens are equal.
        """
        if self.ratio == "sequence":
            assert responses is not None
            fixed = log_ratio.detach()
            log_ratio = responses.mean(fixed) + (log_ratio - fixed)
        ratio = log_ratio.exp()
        bounded = ratio.clamp(1 - self.low, 1 + (self.low if self.high is None else self.high))
        if self.kind == "cispo":
            return -advantages * bounded.detach() * logprobs, bounded.detach() != ratio.detach()
        free, bound = -advantages * ratio, -advantages * bounded
        losses, held = torch.maximum(free, bound), bound > free
        if self.dual is not None:
            most = torch.where(advantages < 0, -self.dual * advantages, torch.inf)
            losses, held = torch.minimum(losses, most), held | (losses > most)
        return losses, held
