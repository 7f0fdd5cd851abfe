"""surrogate.py against the papers' formulas in float64, with gradients."""

from __future__ import annotations

from math import fsum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.rlhf.algorithms.policy import PolicySums, policy_loss
from puzzle.rlhf.algorithms.surrogate import Responses, Surrogate
from tests.reference import numpy_surrogate

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
OPTIONS: dict[str, Surrogate] = {
    "symmetric": Surrogate(0.2),
    "asymmetric": Surrogate(0.1, 0.3),
    "dual": Surrogate(0.2, None, 1.5),
    "dual below the clip": Surrogate(0.2, 0.6, 1.3),
    "sequence": Surrogate(0.05, 0.08, None, "sequence"),
    "sequence, dual": Surrogate(0.05, None, 1.1, "sequence"),
    "cispo": Surrogate(0.3, 0.2, None, "token", "cispo"),
    "cispo, no lower bound": Surrogate(1.0, 0.2, None, "token", "cispo"),
    "cispo of sequences": Surrogate(0.05, 0.08, None, "sequence", "cispo"),
}


class Case:
    """Ragged random rows; advantages are one per row by `alike`, else one per token."""

    def __init__(self, lengths: list[int], seed: int, alike: bool) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = lengths
        self.old = [(rng.normal(size=n) - 2).tolist() for n in lengths]
        self.new = [(np.array(row) + 0.3 * rng.normal(size=len(row))).tolist() for row in self.old]
        own = [rng.normal(size=n) for n in lengths]
        self.advantages = [(np.full(len(a), a[0]) if alike else a).tolist() for a in own]

    def loss(self, options: Surrogate, rows: list[int] | None = None) -> tuple[PolicySums, torch.Tensor]:
        """Sums over the packed rows, and the gradient of the loss by the new log-probs."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        flat = [
            torch.tensor([x for row in rows for x in part[row]], dtype=torch.float64)
            for part in (self.new, self.old, self.advantages)
        ]
        responses = Responses.of([self.lengths[row] for row in rows], torch.device("cpu"))
        flat[0].requires_grad_()
        everywhere = torch.ones(len(flat[0]), dtype=torch.bool)
        sums = policy_loss(*flat, everywhere, surrogate=options, responses=responses)
        (gradient,) = torch.autograd.grad(sums.loss, flat[0])
        return sums, gradient


def truth(case: Case, o: Surrogate) -> numpy_surrogate.Loss:
    given_options: dict[str, Any] = {"low": o.low, "high": o.low if o.high is None else o.high}
    if o.dual is not None:
        given_options["dual"] = o.dual
    rows = (case.new, case.old, case.advantages)
    return numpy_surrogate.surrogate_loss(*rows, **given_options, level=o.ratio, kind=o.kind)


cases = st.builds(Case, LENGTHS, st.integers(0, 2**32 - 1), st.just(True))
token_cases = st.builds(Case, LENGTHS, st.integers(0, 2**32 - 1), st.just(False))


def check(case: Case, options: Surrogate) -> None:
    expected, (sums, gradient) = truth(case, options), case.loss(options)
    n = expected.tokens
    assert float(sums.loss.detach()) / n == pytest.approx(expected.value, abs=1e-9)
    assert int(sums.clipped) == round(expected.clip_fraction * n)
    flat = [x * n for row in expected.gradient for x in row]
    np.testing.assert_allclose(gradient.numpy(), flat, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
@given(cases)
def test_losses_and_gradients_are_the_papers(name: str, case: Case) -> None:
    check(case, OPTIONS[name])


@pytest.mark.parametrize("name", [name for name, o in OPTIONS.items() if o.ratio == "token"])
@given(token_cases)
def test_tokens_may_have_advantages_of_their_own(name: str, case: Case) -> None:
    check(case, OPTIONS[name])


@given(token_cases)
def test_a_ratio_of_a_response_leaves_every_token_its_own_advantage(case: Case) -> None:
    """GSPO-token: the value is GSPO's, the gradient of a token has the ratio and its own advantage."""
    wide = Surrogate(0.99, 50.0, None, "sequence")
    sums, gradient = case.loss(wide)
    assert float(sums.loss.detach()) / sum(case.lengths) == pytest.approx(truth(case, wide).value, abs=1e-9)
    ratios = [np.exp(np.mean(np.array(n) - o)) for n, o in zip(case.new, case.old, strict=True)]
    rows = zip(ratios, case.advantages, strict=True)
    flat = np.concatenate([-s * np.array(advantages) for s, advantages in rows])
    np.testing.assert_allclose(gradient.numpy(), flat, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@given(cases, st.randoms(use_true_random=False))
def test_rows_in_any_order_and_cut_give_the_same(name: str, case: Case, random: Any) -> None:
    """Micro-batches of whole responses add up, and gradients go along with their rows."""
    options, rows = OPTIONS[name], list(range(len(case.lengths)))
    whole, gradient = case.loss(options)
    random.shuffle(rows)
    cut = random.randint(0, len(rows))
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    found = [case.loss(options, part) for part in parts]
    total = sum(float(s.loss.detach()) for s, _ in found)
    assert total == pytest.approx(float(whole.loss.detach()), abs=1e-9)
    assert sum(int(s.clipped) for s, _ in found) == int(whole.clipped)
    of_row = torch.split(gradient, case.lengths)
    expected = torch.cat([of_row[row] for part in parts for row in part])
    torch.testing.assert_close(torch.cat([g for _, g in found]), expected)


def test_sums_of_responses_are_float64_whatever_they_are_of() -> None:
    """Log-probs of long responses are large beside what a step changes."""
    rows = [[1e8, 1.0, -1e8, 0.25], [0.5], [2.0**24, 1.0, 1.0]]
    responses = Responses.of([len(row) for row in rows], torch.device("cpu"))
    packed = torch.tensor([x for row in rows for x in row], dtype=torch.float32)
    found = responses.sums(packed)
    assert found.dtype == torch.float64
    assert found.tolist() == [fsum(row) for row in rows]
    means = responses.mean(packed)
    assert means.dtype == torch.float32
    assert means.tolist() == [np.float32(fsum(row) / len(row)) for row in rows for _ in row]


def test_what_is_clipped() -> None:
    """By hand: which of rising and falling ratios still have a gradient, for gains and losses."""
    ratios = torch.tensor([0.5, 0.85, 1.15, 1.25, 1.5, 4.0], dtype=torch.float64)

    def slopes(options: Surrogate, advantage: float) -> list[bool]:
        log_ratio = ratios.log().requires_grad_()
        losses, held = options.losses(log_ratio, log_ratio, torch.full_like(ratios, advantage))
        (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
        if options.kind == "clipped":
            assert torch.equal(held, gradient == 0)
        return (gradient != 0).tolist()

    assert slopes(Surrogate(0.2), 1.0) == [True, True, True, False, False, False]
    assert slopes(Surrogate(0.2, 0.3), 1.0) == [True, True, True, True, False, False]
    assert slopes(Surrogate(0.1, 0.3), -1.0) == [False, False, True, True, True, True]
    assert slopes(Surrogate(0.2, None, 3.0), -1.0) == [False, True, True, True, True, False]
    assert slopes(Surrogate(0.2, None, 3.0), 1.0) == slopes(Surrogate(0.2), 1.0)
    assert all(slopes(Surrogate(0.2, 0.3, None, "token", "cispo"), 1.0))
