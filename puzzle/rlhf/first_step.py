"""How far the policy that learns is from the one that generated, before any step has changed it."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.engine.runtime.world import World


class FirstStep:
    """Sums over the response tokens of the first optimizer step, from its forward passes.

    `note` takes micro-batches of this rank, where it speaks for its replica; `metrics` is of all ranks.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # Per distance (of the ratio from 1; in nats from generation): sum, sum of absolutes, sum of squares,
        # count. Then tokens that the clip held back.
        self._sums = torch.zeros(9, dtype=torch.float64, device=world.device)
        self._largest = torch.zeros(2, dtype=torch.float64, device=world.device)

    def note(
        self, logprobs_N: Tensor, old_N: Tensor, sampled_N: Tensor | None, clipped: Tensor | None
    ) -> None:
        """One micro-batch: log-probs of the forward pass, of the old policy, of generation; float32 (N,).

        `clipped`: how many tokens the clip held back, None where a loss has no clip.
        """
        self._add(0, (logprobs_N - old_N).double().expm1())
        if sampled_N is not None:
            self._add(1, (logprobs_N - sampled_N).double())
        if clipped is not None:
            self._sums[8] += clipped

    def _add(self, which: int, distance_N: Tensor) -> None:
        size_N = distance_N.abs()
        # `new_full` fills on the device; a tensor of a number would be copied there, and the pipeline wait.
        found = torch.stack(
            [distance_N.sum(), size_N.sum(), size_N.square().sum(), distance_N.new_full((), len(distance_N))]
        )
        self._sums[4 * which : 4 * which + 4] += found
        if len(size_N):
            self._largest[which] = torch.maximum(self._largest[which], size_N.max())

    def metrics(self, clips: bool) -> dict[str, float]:
        """What docs/log-schema.md says of `first_ratio` and `logprob_gap`; equal on every rank.

        `clips`: whether the algorithm's loss counts clipped tokens.
        """
        ratio, _, ratio_squares, tokens, _, gap, gap_squares, drawn, held = self.world.sum(
            self._sums.clone()
        ).tolist()
        furthest, largest = self.world.max(self._largest.clone()).tolist()
        found = {
            "first_ratio": 1 + ratio / tokens,
            "first_ratio_gap": furthest,
            "first_ratio_rms": (ratio_squares / tokens) ** 0.5,
        }
        if clips:
            found["first_clip_frac"] = held / tokens
        if drawn:
            found |= {
                "logprob_gap": gap / drawn,
                "logprob_gap_max": largest,
                "logprob_gap_rms": (gap_squares / drawn) ** 0.5,
            }
        return found
