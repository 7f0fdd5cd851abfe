"""Fits the constants of the cost model to a few measured runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.errors import UserError
from puzzle.plan.predict.iteration import Workload, predict
from puzzle.plan.predict.rates import NAMES, Rates

NOISE, DOUBT = 0.02, 0.2
"""Standard deviations of logarithms: of measured seconds, and of the constants that one expects."""
ROUNDS, STEP, SHORTEST, MOST_STEP = 40, 1e-4, 1e-4, 1.0


@dataclass(frozen=True)
class Sample:
    """What a run took: seconds of three stages of an iteration."""

    work: Workload
    generation: float
    inference: float
    training: float


def fit(samples: Sequence[Sample], expected: Rates) -> Rates:
    """The likeliest constants: least squares of the logarithms of seconds (in units of NOISE) and of
    constants (their distance from `expected`, of DOUBT): what runs do not tell stays as expected.

    UserError unless a run is tensor-parallel: others say nothing of that. Damped Gauss-Newton steps.
    """
    if all(max(one.work.actor.layout.tp, one.work.generation.tp) == 1 for one in samples):
        raise UserError(
            "a calibration needs a run with tp of at least 2; without one, tp is predicted 6-9 % off"
        )
    at, damping = _logarithms(expected), 1e-3
    found = _residuals(samples, at, expected)
    for _ in range(ROUNDS):
        columns = []
        for i in range(len(NAMES)):
            moved = at.copy()
            moved[i] += STEP
            columns.append((_residuals(samples, moved, expected) - found) / STEP)
        slope = np.stack(columns, axis=1)
        normal = slope.T @ slope
        while damping < 1e12:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ found)
            step = np.clip(step, -MOST_STEP, MOST_STEP)
            tried = _residuals(samples, at + step, expected)
            if tried @ tried < found @ found:
                break
            damping *= 4
        else:
            break
        at, found, damping = at + step, tried, damping / 4
        if np.abs(step).max() < SHORTEST:
            break
    return _rates(at, expected)


def _rates(logarithms: np.ndarray, expected: Rates) -> Rates:
    """With what is no constant of a fit as expected."""
    return expected.with_values(dict(zip(NAMES, map(math.exp, logarithms), strict=True)))


def _logarithms(rates: Rates) -> np.ndarray:
    return np.log(list(rates.values().values()))


def _residuals(samples: Sequence[Sample], at: np.ndarray, expected: Rates) -> np.ndarray:
    """float64 (3 samples + constants,), in standard deviations."""
    rates, out = _rates(at, expected), []
    for sample in samples:
        seconds = predict(sample.work, rates)
        pairs = (
            (seconds.generation, sample.generation),
            (seconds.inference, sample.inference),
            (seconds.training, sample.training),
        )
        out += [math.log(ours / theirs) / NOISE for ours, theirs in pairs]
    return np.concatenate([out, (at - _logarithms(expected)) / DOUBT])
