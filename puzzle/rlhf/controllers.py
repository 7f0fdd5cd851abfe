"""What a run adapts between iterations: the KL coefficient, and the scale of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from puzzle.rlhf.algorithms.scale import divisor_of

KL_COEFS = (1e-10, 1e10)
"""What an adaptive coefficient stays between: from zero or infinity it could not come back."""


def adapted_kl_coef(coef: float, observed: float, target: float, responses: int, horizon: int) -> float:
    """The next KL coefficient of a controller that is proportional in log space (Ziegler et al. 2019,
    section 2.2).

    `observed` and `target` are KL in nats per response; an error of 20 % or more changes the coefficient by
    20 % every `horizon` responses. One observation counts for one horizon at most, however many responses it
    is of, and the coefficient stays within `KL_COEFS`. Without an observation (NaN) it stays as it is.
    """
    if math.isnan(observed):
        return coef
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    lowest, highest = KL_COEFS
    return min(max(coef * (1.0 + error * min(responses / horizon, 1.0)), lowest), highest)


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores so far: three numbers to save and to resume
    from.

    Merging follows Chan, Golub and LeVeque 1983, so the state does not depend on how scores came in
    batches.
    """

    count: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    def merged(self, moments_3: Tensor) -> RunningMoments:
        """The state after a batch with these `moments` (already added over replicas)."""
        total, squares, count = moments_3.tolist()
        if count == 0:
            return self
        both = self.count + count
        shift = total / count - self.mean
        deviations = max(squares - total**2 / count, 0.0)
        return RunningMoments(
            count=both,
            mean=self.mean + shift * count / both,
            deviations=self.deviations + deviations + shift**2 * self.count * count / both,
        )

    def scaled(self, scores: Tensor) -> Tensor:
        """Scores divided by the running standard deviation; unchanged while all that were seen are equal
        but for rounding.
        """
        divisor = divisor_of(self.mean, self.deviations / self.count) if self.count else None
        return scores if divisor is None else scores / divisor
