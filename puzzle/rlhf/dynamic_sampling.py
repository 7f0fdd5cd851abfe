"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2): groups whose scores are all equal
have no advantages; other prompts take their places.

Every rank holds the same experiences and scores, and so comes to the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from puzzle.data.prompts import Prompt
from puzzle.rlhf.algorithms.scale import divisor_of
from puzzle.rlhf.experience import Experience, joined


@dataclass(frozen=True)
class Drawn:
    """Prompts, their responses with raw scores, and `learned_B`, the scores that advantages are made of."""

    prompts: Sequence[Prompt]
    experience: Experience
    learned_B: Tensor


class Refilled(NamedTuple):
    """What an iteration learns from, and metrics of how it was found."""

    prompts: Sequence[Prompt]
    experience: Experience
    metrics: dict[str, float]


def teaches(scores_G: Tensor) -> bool:
    """Whether the scores of a group differ by more than rounding."""
    scores_G = scores_G.double()
    return divisor_of(float(scores_G.mean()), float(scores_G.var(correction=0))) is not None


def _reward(experience: Experience, group: int) -> float:
    """The mean raw score of a group."""
    assert experience.scores_B is not None, "what is drawn has been scored"
    return float(experience.scores_B.reshape(-1, experience.samples)[group].double().mean())


def refilled(
    next_prompts: Callable[[], list[Prompt]], draw: Callable[[list[Prompt]], Drawn], rounds: int
) -> Refilled:
    """Groups that teach, from a first batch of prompts and at most `rounds` further ones.

    A batch is drawn as a whole; what it has too many is left. A prompt that the iteration has seen is passed
    over: its noise, hence its responses, would be the same. Without enough groups that teach, the first that
    do not are the batch's fill, so that its shape, minibatches and layouts stay.
    """
    parts: list[Drawn] = []
    seen: set[int] = set()
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    prompts = next_prompts()
    size = len(prompts)
    while prompts:
        part = draw(prompts)
        for group, scores_G in enumerate(part.learned_B.cpu().reshape(size, -1)):
            if prompts[group].index not in seen:
                found[teaches(scores_G)].append((len(parts), group))
        seen.update(prompt.index for prompt in prompts)
        parts.append(part)
        prompts = []
        if len(found[True]) < size and len(parts) <= rounds:
            prompts = next_prompts()
            if all(prompt.index in seen for prompt in prompts):
                prompts = []
    chosen = found[True][:size]
    fill = size - len(chosen)
    chosen += found[False][:fill]
    experience = joined([part.experience for part in parts], chosen)
    groups = found[True] + found[False]
    return Refilled(
        [parts[part].prompts[group] for part, group in chosen],
        replace(experience, fill=fill),
        {
            "sampling_rounds": len(parts) - 1,
            "dropped_frac": len(found[False]) / len(groups),
            "fill_frac": fill / size,
            "drawn_reward": fmean(_reward(parts[part].experience, group) for part, group in groups),
        },
    )
