"""Surrogate losses written plainly in float64 from their papers, one ragged sequence at a time, with
gradients by the chain rule: the truth for puzzle.rlhf.algorithms.surrogate."""

import math

from tests.reference.numpy_ppo import Loss, Ragged


def _ratio(new: list[float], old: list[float], level: str, t: int) -> float:
    if level == "token":
        return math.exp(new[t] - old[t])
    product = 1.0
    for a, b in zip(new, old, strict=True):
        product *= math.exp(a - b)
    return product ** (1 / len(new))


def surrogate_loss(
    new: Ragged,
    old: Ragged,
    advantages: Ragged,
    *,
    low: float,
    high: float,
    dual: float = math.inf,
    level: str = "token",
    kind: str = "clipped",
) -> Loss:
    """The mean over tokens. By sequence with `clipped` it is GSPO itself: every token's loss holds the
    response's ratio, whose derivative with respect to any token's log-prob is the ratio over the length.
    """
    tokens = sum(len(row) for row in new)
    total, held = 0.0, 0
    gradient: Ragged = []
    for news, olds, gains in zip(new, old, advantages, strict=True):
        slopes = [0.0] * len(news)
        for t, gain in enumerate(gains):
            rho = _ratio(news, olds, level, t)
            limited = min(max(rho, 1 - low), 1 + high)
            if kind == "cispo":
                total -= gain * limited * news[t]
                slopes[t] -= gain * limited
                held += limited != rho
                continue
            objective, by_rho = rho * gain, gain
            if limited * gain < objective:
                objective, by_rho = limited * gain, 0.0
            if gain < 0 and objective < dual * gain:
                objective, by_rho = dual * gain, 0.0
            held += by_rho != gain
            total -= objective
            whose = [t] if level == "token" else range(len(news))
            for u in whose:
                slopes[u] -= by_rho * rho / len(whose)
        gradient.append([slope / tokens for slope in slopes])
    return Loss(total / tokens, gradient, held / tokens, 0.0, tokens)
