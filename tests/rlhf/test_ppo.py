"""ppo.py against the plain float64 reference, on ragged random batches with garbage in the padding."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.rlhf import controllers
from puzzle.rlhf.algorithms import groups, policy, ppo, scale
from puzzle.rlhf.algorithms.surrogate import Surrogate
from tests.reference import numpy_ppo

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = st.sampled_from(list(TOLERANCE))
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


class Case:
    """Ragged rows and their padded tensors; the padding holds NaN and infinities."""

    def __init__(self, lengths: list[int], seed: int, dtype: torch.dtype) -> None:
        self.lengths, self.dtype = lengths, dtype
        self.rng = np.random.default_rng(seed)
        width = max(lengths) + 2
        self.mask_BS = torch.arange(width) < torch.tensor(lengths)[:, None]

    def rows(self, scale: float = 1.0, shift: float = 0.0) -> list[list[float]]:
        rows = [self.rng.normal(size=n) * scale + shift for n in self.lengths]
        return [[float(torch.tensor(x, dtype=self.dtype)) for x in row] for row in rows]

    def near(self, rows: list[list[float]], scale: float) -> list[list[float]]:
        moved = [[x + scale * self.rng.normal() for x in row] for row in rows]
        return [[float(torch.tensor(x, dtype=self.dtype)) for x in row] for row in moved]

    def padded(self, rows: list[list[float]]) -> torch.Tensor:
        garbage = torch.tensor(self.rng.choice([np.nan, np.inf, -np.inf, 1e30], size=self.mask_BS.shape))
        result = garbage.to(self.dtype)
        result[self.mask_BS] = torch.tensor([x for row in rows for x in row], dtype=self.dtype)
        return result

    def packed(self, rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=self.dtype)

    def check(self, result_BS: torch.Tensor, rows: list[list[float]], scale: float = 1.0) -> None:
        """Rows inside the mask equal; outside exactly 0."""
        assert result_BS.dtype == self.dtype
        assert not result_BS[~self.mask_BS].any()
        flat = np.array([x for row in rows for x in row])
        bound = TOLERANCE[self.dtype] * scale * max(1.0, np.abs(flat).max(initial=0.0))
        np.testing.assert_allclose(result_BS[self.mask_BS].double().numpy(), flat, rtol=0, atol=bound)

    def close(self, result: torch.Tensor, expected: float) -> None:
        bound = TOLERANCE[self.dtype] * max(1.0, abs(expected), sum(self.lengths))
        assert float(result.detach()) == pytest.approx(expected, abs=bound)


cases = st.builds(Case, LENGTHS, SEEDS, DTYPES)


@given(cases, st.sampled_from(["k1", "k2", "k3"]), st.booleans(), st.sampled_from([5.0, 0.5]))
def test_rewards(case, estimator, reference_free, limit):
    logprobs = case.rows(1.0, -2.0)
    reference = None if reference_free else case.near(logprobs, 0.5)
    scores = [float(x) for x in case.rng.normal(size=len(case.lengths)).astype(np.float32) * 8]
    kl_BS = None
    if reference is not None:
        kl_BS = policy.token_kl(case.padded(logprobs), case.padded(reference), estimator)
    scores_B = torch.tensor(scores, dtype=case.dtype)
    rewards_BS = ppo.token_rewards(scores_B, kl_BS, case.mask_BS, 0.1, limit)
    case.check(rewards_BS, numpy_ppo.rewards(logprobs, reference, scores, 0.1, limit, estimator))


@given(cases, st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)]))
def test_gae(case, discounts):
    gamma, lam = discounts
    rewards, values = case.rows(), case.rows()
    advantages_BS, returns_BS = ppo.gae(
        case.padded(rewards), case.padded(values), case.mask_BS, gamma=gamma, lam=lam
    )
    both = [numpy_ppo.gae(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    case.check(advantages_BS, [a for a, _ in both])
    case.check(returns_BS, [r for _, r in both])


@pytest.mark.parametrize(("rows", "positions"), [(0, 4), (3, 0), (1, 1)])
def test_gae_of_next_to_nothing(rows, positions):
    given, mask = torch.ones(rows, positions), torch.ones(rows, positions, dtype=torch.bool)
    advantages, returns = ppo.gae(given, 3 * given, mask, 0.9, 0.8)
    assert advantages.shape == returns.shape == (rows, positions)
    assert advantages.eq(-2).all()
    assert returns.eq(1).all()


def test_gae_does_not_change_its_inputs_and_carries_no_gradient():
    values = torch.ones(2, 3, requires_grad=True)
    rewards = torch.ones(2, 3)
    advantages, returns = ppo.gae(rewards, values, torch.ones(2, 3, dtype=torch.bool), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert rewards.eq(1).all()
    assert values.eq(1).all()


@given(cases, st.integers(1, 4))
def test_whitening_over_ranks(case, ranks):
    rows = case.rows(3.0, 10.0)
    x_BS = case.padded(rows)
    parts = [
        scale.moments(part, mask)
        for part, mask in zip(x_BS.chunk(ranks), case.mask_BS.chunk(ranks), strict=True)
    ]
    case.check(scale.whiten(x_BS, case.mask_BS, torch.stack(parts).sum(0)), numpy_ppo.whiten(rows), scale=100)


def backward(sums, leaf_BS, tokens):
    (sums.loss / tokens).backward()
    return leaf_BS.grad


@given(cases, st.sampled_from([0.2, 0.05]))
def test_policy_loss_and_gradient(case, clip):
    old = case.rows(1.0, -2.0)
    new, advantages = case.near(old, 0.3), case.rows()
    expected = numpy_ppo.policy_loss(new, old, advantages, clip)
    tokens = max(expected.tokens, 1)
    leaf_BS = case.padded(new).requires_grad_()
    sums = policy.policy_loss(
        leaf_BS, case.padded(old), case.padded(advantages), case.mask_BS, surrogate=Surrogate(clip)
    )
    case.close(sums.loss, expected.value * tokens)
    case.close(sums.approx_kl, expected.approx_kl * tokens)
    assert int(sums.clipped) == round(expected.clip_fraction * tokens)
    assert int(sums.tokens) == expected.tokens
    case.check(backward(sums, leaf_BS, tokens), expected.gradient)


@given(cases, st.sampled_from([0.2, 0.5, None]))
def test_value_loss_and_gradient(case, clip):
    old = case.rows()
    new, returns = case.near(old, 0.4), case.near(old, 1.0)
    expected = numpy_ppo.value_loss(new, old, returns, clip)
    tokens = max(expected.tokens, 1)
    leaf_BS = case.padded(new).requires_grad_()
    sums = ppo.value_loss(leaf_BS, case.padded(old), case.padded(returns), case.mask_BS, clip=clip)
    case.close(sums.loss, expected.value * tokens)
    case.close(sums.squared_error, 2 * tokens * numpy_ppo.value_loss(new, old, returns, None).value)
    assert int(sums.clipped) == round(expected.clip_fraction * tokens)
    case.check(backward(sums, leaf_BS, tokens), expected.gradient)


@given(cases, st.sampled_from(["k1", "k2", "k3"]))
def test_kl_and_entropy_in_the_loss(case, estimator):
    old = case.rows(1.0, -2.0)
    new, reference, entropy = case.near(old, 0.1), case.near(old, 0.5), case.rows(1.0, 3.0)
    zero = [[0.0] * n for n in case.lengths]
    leaf_BS, entropy_BS = case.padded(new).requires_grad_(), case.padded(entropy).requires_grad_()
    sums = policy.policy_loss(
        leaf_BS,
        case.padded(old),
        case.padded(zero),
        case.mask_BS,
        surrogate=Surrogate(0.2),
        entropy=entropy_BS,
        entropy_coef=0.01,
        ref_logprobs=case.padded(reference),
        kl_coef=0.2,
        kl_estimator=estimator,
    )
    expected = numpy_ppo.kl_loss(new, reference, estimator)
    tokens = max(expected.tokens, 1)
    total = sum(x for row in entropy for x in row)
    case.close(sums.loss, 0.2 * expected.value * tokens - 0.01 * total)
    sums.loss.backward()
    assert leaf_BS.grad is not None
    assert entropy_BS.grad is not None
    case.check(leaf_BS.grad, [[0.2 * tokens * g for g in row] for row in expected.gradient])
    case.check(entropy_BS.grad, [[-0.01] * n for n in case.lengths])


@given(cases, st.integers(1, 5))
def test_packed_micro_batches_add_up(case, parts):
    """A padded minibatch and its packed tokens cut anywhere give the same sums and gradients."""
    old = case.rows(1.0, -2.0)
    new, advantages = case.near(old, 0.3), case.rows()
    leaf_BS = case.padded(new).requires_grad_()
    whole = policy.policy_loss(
        leaf_BS, case.padded(old), case.padded(advantages), case.mask_BS, surrogate=Surrogate(0.2)
    )
    whole.loss.backward()
    leaf_T = case.packed(new).requires_grad_()
    everywhere = torch.ones_like(leaf_T, dtype=torch.bool)
    tensors = (leaf_T, case.packed(old), case.packed(advantages), everywhere)
    pieces = [
        policy.policy_loss(*piece, surrogate=Surrogate(0.2))
        for piece in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)
    ]
    for piece in pieces:
        piece.loss.backward()
    for field in policy.PolicySums._fields:
        case.close(
            sum(getattr(piece, field) for piece in pieces).detach(), float(getattr(whole, field).detach())
        )
    assert leaf_BS.grad is not None
    torch.testing.assert_close(leaf_T.grad, leaf_BS.grad[case.mask_BS])


def test_an_empty_micro_batch_is_harmless():
    empty = torch.full((7,), math.nan, requires_grad=True)
    nothing = torch.zeros(7, dtype=torch.bool)
    for sums in (
        policy.policy_loss(
            empty, empty.detach(), empty.detach(), nothing, surrogate=Surrogate(0.2), entropy=empty
        ),
        ppo.value_loss(empty, empty.detach(), empty.detach(), nothing, clip=0.2),
    ):
        empty.grad = None
        sums.loss.backward()
        assert empty.grad is not None
        assert not empty.grad.any()
        assert all(float(x.detach()) == 0 for x in sums)
    assert not scale.whiten(empty.detach(), nothing, scale.moments(empty.detach(), nothing)).any()


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k4"):
        policy.token_kl(torch.zeros(1), torch.zeros(1), "k4")  # ty: ignore[invalid-argument-type]


@given(st.floats(0.001, 1), st.floats(0, 50), st.floats(0.1, 20), st.integers(1, 512))
def test_adaptive_kl(coef, observed, target, responses):
    expected = numpy_ppo.adaptive_kl(coef, observed, target, responses, 1000)
    assert controllers.adapted_kl_coef(coef, observed, target, responses, 1000) == pytest.approx(expected)


def test_adaptive_kl_reaches_its_target():
    coef = 0.5
    for _ in range(2000):  # a policy whose KL falls as the coefficient rises
        coef = controllers.adapted_kl_coef(coef, 0.3 / coef, 6.0, 64, 1000)
    assert 0.3 / coef == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("horizon", [1, 3, 64])
@pytest.mark.parametrize("observed", [0.0, -3.0, 1e-300, 6.0, 1e300, math.inf, math.nan])
def test_adaptive_kl_with_more_responses_than_its_horizon(horizon, observed):
    """A step is a horizon's at most, and from whatever a long run came to, the way back is open."""
    error = 0.0 if math.isnan(observed) else min(max(observed / 6.0 - 1, -0.2), 0.2)
    assert controllers.adapted_kl_coef(0.1, observed, 6.0, 64, horizon) == pytest.approx(0.1 * (1 + error))
    coef = 0.1
    for _ in range(6000):
        coef = controllers.adapted_kl_coef(coef, observed, 6.0, 64, horizon)
    assert 0 < coef < math.inf
    lower, higher = (controllers.adapted_kl_coef(coef, seen, 6.0, 64, horizon) for seen in (0.0, 12.0))
    assert lower < coef or coef == 1e-10
    assert higher > coef or coef == 1e10


EQUAL = [0.85, 1 / 3, -7.3, 1e6 + 0.1, 3e38, 1e-30, 0.0]


@pytest.mark.parametrize("value", EQUAL)
@pytest.mark.parametrize("batches", [(1,), (15,), (1, 7, 64), (333, 1000)])
def test_equal_scores_are_neither_scaled_nor_blown_up(value, batches):
    state = controllers.RunningMoments()
    for count in batches:
        scores = torch.full((count,), value)
        state = state.merged(scale.moments(scores, torch.ones(count, dtype=torch.bool)))
        assert torch.equal(state.scaled(scores), scores)
        whole = scale.moments(scores, torch.ones(count, dtype=torch.bool))
        assert not scale.whiten(scores, torch.ones(count, dtype=torch.bool), whole).any()


@pytest.mark.parametrize("value", EQUAL[:4])
def test_rounding_is_no_spread(value):
    """What a model gives for equal texts in other batches differs in the last places."""
    scores = torch.full((16,), value)
    scores[::3] = torch.nextafter(scores[::3], torch.tensor(math.inf))
    mask = torch.ones(16, dtype=torch.bool)
    assert torch.equal(
        controllers.RunningMoments().merged(scale.moments(scores, mask)).scaled(scores), scores
    )
    assert not scale.whiten(scores, mask, scale.moments(scores, mask)).any()


@pytest.mark.parametrize("size", [1e37, 1e6, 1.0, 1e-3])
def test_a_spread_of_any_size_becomes_1(size):
    scores = torch.tensor([1.0, 2.0, 3.5, -0.5]) * size
    mask = torch.ones(4, dtype=torch.bool)
    state = controllers.RunningMoments().merged(scale.moments(scores, mask))
    exact = scores.double().numpy()
    expected = exact / np.sqrt(exact.var() + 1e-8)
    np.testing.assert_allclose(state.scaled(scores).numpy(), expected, rtol=1e-5)
    whitened = scale.whiten(scores, mask, scale.moments(scores, mask)).numpy()
    np.testing.assert_allclose(
        whitened, (exact - exact.mean()) / np.sqrt(exact.var() + 1e-8), rtol=1e-4, atol=1e-6
    )


@given(st.lists(st.lists(st.floats(-100, 100), max_size=8), max_size=6))
def test_running_moments(batches):
    state = controllers.RunningMoments()
    for batch in batches:
        scores = torch.tensor(batch, dtype=torch.float64)
        state = state.merged(scale.moments(scores, torch.ones_like(scores, dtype=torch.bool)))
        state = controllers.RunningMoments(**json.loads(json.dumps(dataclasses.asdict(state))))
    everything = np.array([x for batch in batches for x in batch])
    assert state.count == everything.size
    if everything.size:
        assert state.mean == pytest.approx(everything.mean(), abs=1e-9)
        assert state.deviations / state.count == pytest.approx(everything.var(), abs=1e-8)
    scores = torch.tensor([1.0, -2.0], dtype=torch.float64)
    if everything.size and everything.var() > 1e-6:
        expected = scores.numpy() / np.sqrt(everything.var() + 1e-8)
        np.testing.assert_allclose(state.scaled(scores).numpy(), expected, rtol=1e-4)
    elif not everything.size:
        assert state.scaled(scores) is scores


@given(cases, st.integers(0, 10**6))
def test_weights_count_every_token_by_itself(case, seed):
    """A weighted sum is the sum over tokens of each one's loss times its weight, gradients too."""
    old, advantages, returns = case.rows(1.0, -2.0), case.rows(), case.rows()
    new = case.near(old, 0.3)
    weights_BS = torch.rand(case.mask_BS.shape, generator=torch.Generator().manual_seed(seed))
    losses = (
        lambda leaf, **w: policy.policy_loss(
            leaf, case.padded(old), case.padded(advantages), case.mask_BS, surrogate=Surrogate(0.2), **w
        ),
        lambda leaf, **w: ppo.value_loss(
            leaf, case.padded(old), case.padded(returns), case.mask_BS, clip=0.2, **w
        ),
    )
    for loss in losses:
        plain_BS, leaf_BS = case.padded(new).requires_grad_(), case.padded(new).requires_grad_()
        loss(plain_BS).loss.backward()
        loss(leaf_BS, weights=weights_BS).loss.backward()
        assert leaf_BS.grad is not None
        assert plain_BS.grad is not None
        torch.testing.assert_close(leaf_BS.grad, plain_BS.grad * weights_BS)


ALGORITHMS = {"grpo": groups.GRPO, "dr_grpo": groups.DrGRPO, "rloo": groups.RLOO}


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=24),
    st.integers(2, 6),
    st.sampled_from(sorted(ALGORITHMS)),
)
def test_advantages_within_groups(scores, samples, name):
    scores = (scores * samples)[: len(scores) // samples * samples or samples]
    found = groups.group_advantages(torch.tensor(scores), samples, ALGORITHMS[name].of_group)
    expected = numpy_ppo.group_advantages(scores, samples, name)
    spreads = [np.ptp(scores[i : i + samples]) for i in range(0, len(scores), samples)]
    for place, (got, want) in enumerate(zip(found.tolist(), expected, strict=True)):
        if spreads[place // samples] > 1e-3 or spreads[place // samples] == 0:
            assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_groups_stand_alone(kind):
    """Other groups change nothing, order inside a group goes along, equal scores teach nothing."""
    one, other = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([7.0, 7.0, 7.0])
    alone = groups.group_advantages(one, 3, kind.of_group)
    both = groups.group_advantages(torch.cat([other, one]), 3, kind.of_group)
    assert torch.equal(both, torch.cat([torch.zeros(3), alone]))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(groups.group_advantages(one[order], 3, kind.of_group), alone[order])
    assert float(groups.group_advantages(torch.full((4,), 0.1), 2, kind.of_group).abs().max()) < 1e-15
    with pytest.raises(ValueError, match="group of one"):
        groups.group_advantages(one, 1, kind.of_group)
