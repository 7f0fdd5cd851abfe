"""PPO and GRPO arithmetic written plainly in float64, one ragged sequence at a time: the truth that the
algorithms of puzzle.rlhf are checked against.

A sequence is a list of floats, one per answer token; a batch is a list of such lists of any lengths (0
included). Nothing is padded and nothing is masked, so a mistake in masks cannot hide here. Losses are
averages over all answer tokens of the batch.
"""

import math
from dataclasses import dataclass

import numpy as np

Ragged = list[list[float]]


def kl_estimate(logprob: float, ref_logprob: float, estimator: str) -> float:
    """One token's estimate of KL(policy || reference), the token drawn from the policy."""
    ratio = math.exp(ref_logprob - logprob)
    if estimator == "k1":
        return -math.log(ratio)
    if estimator == "k2":
        return math.log(ratio) ** 2 / 2
    if estimator == "k3":
        return (ratio - 1) - math.log(ratio)
    raise ValueError(estimator)


def rewards(
    logprobs: Ragged,
    ref_logprobs: Ragged | None,
    scores: list[float],
    beta: float,
    limit: float,
    estimator: str,
) -> Ragged:
    """-beta KL at every answer token, and the clipped score at the last one. Without a reference the KL is
    0.
    """
    result: Ragged = []
    for i, row in enumerate(logprobs):
        reward = []
        for t in range(len(row)):
            kl = kl_estimate(row[t], ref_logprobs[i][t], estimator) if ref_logprobs is not None else 0.0
            reward.append(-beta * kl)
        if reward:
            reward[-1] += min(max(scores[i], -limit), limit)
        result.append(reward)
    return result


def group_advantages(scores: list[float], samples: int, algorithm: str = "grpo") -> list[float]:
    """Each score beside its group, a run of `samples` scores. rloo: less the mean of the others; dr_grpo:
    less the mean of all; grpo: that over the root of the group's variance (n - 1) + 1e-8, 0 where all are the
    same.
    """
    result: list[float] = []
    for start in range(0, len(scores), samples):
        group = scores[start : start + samples]
        mean = sum(group) / samples
        if algorithm == "dr_grpo":
            result += [score - mean for score in group]
            continue
        if algorithm == "rloo":
            others = [[other for j, other in enumerate(group) if j != i] for i in range(samples)]
            result += [score - sum(rest) / len(rest) for score, rest in zip(group, others, strict=True)]
            continue
        spread = math.sqrt(sum((score - mean) ** 2 for score in group) / (samples - 1) + 1e-8)
        result += [0.0 if max(group) == min(group) else (score - mean) / spread for score in group]
    return result


def returns(reward: list[float], gamma: float) -> list[float]:
    """What follows each token, its own reward included, discounted."""
    return [sum(gamma ** (u - t) * r for u, r in enumerate(reward) if u >= t) for t in range(len(reward))]


def reinforce_advantages(
    logprobs: Ragged,
    ref_logprobs: Ragged | None,
    scores: list[float],
    *,
    algorithm: str,
    samples: int,
    beta: float,
    limit: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    greedy: list[float] | None = None,
    counted: int | None = None,
) -> Ragged:
    """Per token, the first `counted` rows alone: reinforce_pp, returns of score and KL at mean 0 and variance
    1; reinforce_pp_baseline, the same of scores less their group's mean; remax, returns of score less the
    greedy answer's (one per prompt), as they are.
    """
    limited = [min(max(score, -limit), limit) for score in scores]
    if algorithm == "reinforce_pp_baseline":
        limited = group_advantages(limited, samples, "dr_grpo")
    if algorithm == "remax":
        assert greedy is not None
        base = [min(max(score, -limit), limit) for score in greedy for _ in range(samples)]
        limited = [score - b for score, b in zip(limited, base, strict=True)]
    per_token = rewards(logprobs, ref_logprobs, limited, beta, math.inf, estimator)
    rows = [returns(row, gamma) for row in per_token]
    count = len(rows) if counted is None else counted
    kept = rows[:count] if algorithm == "remax" else whiten(rows[:count])
    return kept + [[0.0] * len(row) for row in rows[count:]]


def overlong(length: int, longest: int, buffer: int, penalty: float) -> float:
    """What a response of `length` tokens gets beside its score (DAPO, equation 13)."""
    if length <= longest - buffer:
        return 0.0
    return penalty * ((longest - buffer) - length) / buffer


def gae(reward: list[float], value: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages by the definition sum_l (gamma lam)^l delta_{t+l}, and returns = advantages + values; the
    value beyond is 0.
    """
    length = len(reward)
    value_after = [*value[1:], 0.0]
    delta = [reward[t] + gamma * value_after[t] - value[t] for t in range(length)]
    advantage = [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)]
    return advantage, [a + v for a, v in zip(advantage, value, strict=True)]


def whiten(rows: Ragged) -> Ragged:
    """Subtract the mean of all tokens and divide by the root of their variance + 1e-8 (divided by n, not n
    - 1).
    """
    flat = np.array([x for row in rows for x in row], dtype=np.float64)
    if flat.size == 0:
        return rows
    mean, scale = flat.mean(), math.sqrt(flat.var() + 1e-8)
    return [[float((x - mean) / scale) for x in row] for row in rows]


@dataclass
class Loss:
    """A loss averaged over `tokens` answer tokens, its gradient with respect to the network's output per
    token, and fractions.
    """

    value: float
    gradient: Ragged
    clip_fraction: float
    approx_kl: float
    tokens: int


def policy_loss(
    logprobs: Ragged, old_logprobs: Ragged, advantages: Ragged, clip: float, weights: Ragged | None = None
) -> Loss:
    """Mean of max(-A rho, -A clip(rho)), each times its weight: a token of weight 0 counts in the mean.
    approx_kl is the k3 estimate of KL(old || new); tokens drawn from old.
    """
    if weights is None:
        weights = [[1.0] * len(row) for row in logprobs]
    tokens = sum(len(row) for row in logprobs)
    total, clipped, kl = 0.0, 0, 0.0
    gradient: Ragged = []
    for rows in zip(logprobs, old_logprobs, advantages, weights, strict=True):
        gradient.append([])
        for new, old, advantage, weight in zip(*rows, strict=True):
            rho = math.exp(new - old)
            free = -advantage * rho
            bound = -advantage * min(max(rho, 1 - clip), 1 + clip)
            total += weight * max(free, bound)
            clipped += bound > free
            kl += (rho - 1) - (new - old)
            gradient[-1].append(weight * free / max(tokens, 1) if free >= bound else 0.0)
    n = max(tokens, 1)
    return Loss(total / n, gradient, clipped / n, kl / n, tokens)


def correction(
    logprobs: Ragged, drawn: Ragged, kind: str, level: str, cap: float, low: float, high: float
) -> tuple[Ragged, int]:
    """Weights of tokens that were drawn by other log-probs than the policy's, and how many are truncated or
    masked. A token's ratio is pi(policy) / pi(drawn by), a sequence's the product of its tokens'.
    """
    weights: Ragged = []
    count = 0
    for row, drawn_row in zip(logprobs, drawn, strict=True):
        ratios = [math.exp(x) / math.exp(y) for x, y in zip(row, drawn_row, strict=True)]
        if level == "sequence":
            ratios = [math.prod(ratios)] * len(row)
        weights.append([])
        for ratio in ratios:
            if kind == "truncate":
                count += ratio > cap
                weights[-1].append(min(ratio, cap))
            else:
                kept = low <= ratio <= high
                count += not kept
                weights[-1].append(ratio if kept else 0.0)
    return weights, count


def value_loss(values: Ragged, old_values: Ragged, returns: Ragged, clip: float | None) -> Loss:
    """Half the mean of max((V - R)^2, (clip(V, old +- clip) - R)^2)."""
    tokens = sum(len(row) for row in values)
    total, clipped = 0.0, 0
    gradient: Ragged = []
    for value_row, old_row, return_row in zip(values, old_values, returns, strict=True):
        gradient.append([])
        for value, old, target in zip(value_row, old_row, return_row, strict=True):
            bound = value if clip is None else min(max(value, old - clip), old + clip)
            free_error, bound_error = (value - target) ** 2, (bound - target) ** 2
            total += 0.5 * max(free_error, bound_error)
            clipped += bound_error > free_error
            slope = (value - target) if free_error >= bound_error else 0.0
            gradient[-1].append(slope / max(tokens, 1))
    n = max(tokens, 1)
    return Loss(total / n, gradient, clipped / n, 0.0, tokens)


def kl_loss(logprobs: Ragged, ref_logprobs: Ragged, estimator: str) -> Loss:
    """Mean KL estimate as a loss, and its derivative with respect to the policy's log-probs."""
    tokens = sum(len(row) for row in logprobs)
    n = max(tokens, 1)
    total = 0.0
    gradient: Ragged = []
    for row, ref_row in zip(logprobs, ref_logprobs, strict=True):
        gradient.append([])
        for x, ref in zip(row, ref_row, strict=True):
            total += kl_estimate(x, ref, estimator)
            slope = {"k1": 1.0, "k2": x - ref, "k3": 1.0 - math.exp(ref - x)}[estimator]
            gradient[-1].append(slope / n)
    return Loss(total / n, gradient, 0.0, 0.0, tokens)


def adaptive_kl(beta: float, observed: float, target: float, responses: int, horizon: int) -> float:
    """Proportional controller in log space: an error of 20 % or more changes beta by 20 % per `horizon`
    responses.
    """
    error = min(max(observed / target - 1, -0.2), 0.2)
    return beta * (1 + error * responses / horizon)
