"""Advantages without a critic against numpy, and what they may not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.algorithm import COMPARING
from puzzle.config.run import TRAINED
from puzzle.rlhf.algorithms import ALGORITHMS, make_algorithm
from puzzle.rlhf.algorithms.average import token_weights
from puzzle.rlhf.algorithms.base import Outputs
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.overlong import overlong_metrics, overlong_rewards, shaped
from tests.reference import numpy_ppo
from tests.rlhf.one_process import configured

ALONE = [name for name in ALGORITHMS if name != "ppo"]
RETURNS = [name for name in ALONE if name.startswith("re")]
SAMPLES = 3


class Case:
    """Groups of responses with random log-probs and scores; the last `fill` groups are fill."""

    def __init__(self, groups: list[list[int]], seed: int, fill: int = 0) -> None:
        rng = np.random.default_rng(seed)
        lengths = [n for group in groups for n in group]
        self.fill = min(fill, len(groups) - 1)
        self.logprobs = [(rng.normal(size=n) - 2).tolist() for n in lengths]
        self.references = [
            (np.array(row) + 0.3 * rng.normal(size=len(row))).tolist() for row in self.logprobs
        ]
        self.scores = rng.normal(size=len(lengths)) * 3
        self.greedy = rng.normal(size=len(groups))
        prompts = tuple((i + 1,) for i in range(len(groups)))
        self.experience = Experience(
            prompts,
            tuple(range(len(groups))),
            tuple((1,) * n for n in lengths),
            SAMPLES,
            fill=self.fill,
            logprobs_BS=padded(self.logprobs),
            ref_logprobs_BS=padded(self.references),
            greedy_scores_P=torch.tensor(self.greedy),
        )

    @property
    def counted(self) -> int:
        return len(self.scores) - self.fill * SAMPLES


def padded(rows: list[list[float]]) -> torch.Tensor:
    """float64 (B, S) with NaN beyond the rows."""
    out = torch.full((len(rows), max(map(len, rows))), float("nan"), dtype=torch.float64)
    for row, values in enumerate(rows):
        out[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return out


def of(name: str, case: Case, **options: Any) -> torch.Tensor:
    """float64 (B, S) by the project."""
    config = configured(algorithm={"name": name, **options}, generation={"samples": SAMPLES})
    scores_B = torch.tensor(case.scores)
    found = make_algorithm(config.algorithm).advantages(case.experience, scores_B, 0.2).advantages_BS
    assert found is not None
    return found


def truth(name: str, case: Case, place: str, estimator: str, gamma: float, limit: float) -> list[list[float]]:
    references = case.references if place == "reward" else None
    if name in RETURNS:
        return numpy_ppo.reinforce_advantages(
            case.logprobs,
            references,
            case.scores.tolist(),
            algorithm=name,
            samples=SAMPLES,
            beta=0.2,
            limit=limit,
            estimator=estimator,
            gamma=gamma,
            greedy=case.greedy.tolist(),
            counted=case.counted,
        )
    scores = np.clip(case.scores, -limit, limit)
    if references is not None:
        pairs = zip(case.logprobs, references, strict=True)
        scores = scores - [
            0.2 * sum(numpy_ppo.kl_estimate(a, b, estimator) for a, b in zip(x, y, strict=True))
            for x, y in pairs
        ]
    per_row = numpy_ppo.group_advantages(scores.tolist(), SAMPLES, name)
    rows = zip(per_row, case.logprobs, strict=True)
    return [[a * (r < case.counted)] * len(row) for r, (a, row) in enumerate(rows)]


GROUPS = st.lists(st.lists(st.integers(1, 7), min_size=SAMPLES, max_size=SAMPLES), min_size=2, max_size=5)
cases = st.builds(Case, GROUPS, st.integers(0, 2**32 - 1), st.integers(0, 2))


@pytest.mark.parametrize("name", ALONE)
@given(
    cases,
    st.sampled_from([("reward", "k1"), ("reward", "k3"), ("loss", "k2")]),
    st.sampled_from([1.0, 0.9]),
    st.sampled_from([None, 2.0]),
)
def test_advantages_are_numpys(
    name: str, case: Case, kl: tuple[str, str], gamma: float, clip: float | None
) -> None:
    place, estimator = kl
    gamma = gamma if name in RETURNS else 1.0
    options = {"kl": {"place": place, "estimator": estimator}, "reward_clip": clip, "gamma": gamma}
    got = of(name, case, **options)
    expected = truth(name, case, place, estimator, gamma, clip or np.inf)
    flat = np.array([x for row in expected for x in row])
    scale = max(1.0, np.abs(flat).max())
    found = got[case.experience.mask_BS].numpy()
    np.testing.assert_allclose(found, flat, rtol=0, atol=1e-6 * scale)
    assert not got[~case.experience.mask_BS].any()


@given(
    cases,
    st.sampled_from(["reward", "loss"]),
    st.booleans(),
    st.sampled_from([(1.0, 0.95), (0.9, 0.8)]),
    st.booleans(),
    st.sampled_from([None, 2.0]),
)
def test_advantages_and_returns_of_ppo_are_numpys(
    case: Case, place: str, referred: bool, discounts: tuple[float, float], white: bool, clip: float | None
) -> None:
    """With a reference and without, whose KL is part of the rewards or not; by token, from random values."""
    rng = np.random.default_rng(len(case.scores))
    values = [rng.normal(size=len(row)).tolist() for row in case.logprobs]
    experience = replace(case.experience, fill=0, values_BS=padded(values))
    if not referred:
        experience = replace(experience, ref_logprobs_BS=None)
    kl = {"place": place, "estimator": "k3"}
    gamma, lam = discounts
    options = {"kl": kl, "gamma": gamma, "gae_lambda": lam, "whiten": white, "reward_clip": clip}
    algorithm = make_algorithm(configured(ppo=options).algorithm)
    found = algorithm.advantages(experience, torch.tensor(case.scores), 0.2)
    references = case.references if referred and place == "reward" else None
    rewards = numpy_ppo.rewards(case.logprobs, references, case.scores.tolist(), 0.2, clip or np.inf, "k3")
    rows = [numpy_ppo.gae(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    advantages, returns = ([row[i] for row in rows] for i in (0, 1))
    advantages = numpy_ppo.whiten(advantages) if white else advantages
    assert found.advantages_BS is not None
    assert found.returns_BS is not None
    for got_BS, wanted in ((found.advantages_BS, advantages), (found.returns_BS, returns)):
        flat = [x for row in wanted for x in row]
        np.testing.assert_allclose(got_BS[experience.mask_BS].numpy(), flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALONE)
@given(cases, st.randoms(use_true_random=False))
def test_order_of_groups_and_samples_does_not_matter(name: str, case: Case, random: Any) -> None:
    whole = of(name, case)
    count = case.counted // SAMPLES
    groups = random.sample(range(count), count) + list(range(count, count + case.fill))
    rows = [g * SAMPLES + s for g in groups for s in random.sample(range(SAMPLES), SAMPLES)]
    other = Case.__new__(Case)
    e = case.experience
    assert e.logprobs_BS is not None
    assert e.ref_logprobs_BS is not None
    assert e.greedy_scores_P is not None
    other.scores, other.fill = case.scores[rows], case.fill
    other.experience = replace(
        e,
        prompts=tuple(e.prompts[g] for g in groups),
        responses=tuple(e.responses[r] for r in rows),
        logprobs_BS=e.logprobs_BS[rows],
        ref_logprobs_BS=e.ref_logprobs_BS[rows],
        greedy_scores_P=e.greedy_scores_P[groups],
    )
    torch.testing.assert_close(of(name, other), whole[rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALONE)
@given(cases, st.floats(-1e6, 1e6))
def test_fill_changes_no_others_advantages(name: str, case: Case, score: float) -> None:
    """Whatever its scores are; its own are 0."""
    before = of(name, case)
    if case.fill:
        assert not before[case.counted :].any()
    case.scores[case.counted :] = score
    assert torch.equal(of(name, case), before)


@given(cases, st.sampled_from(["token", "sequence", "constant", "microbatch"]), st.integers(1, 4))
def test_fill_is_in_no_average(case: Case, average: Any, size: int) -> None:
    """Weights are those of the minibatch without it, and 0 on its tokens."""
    e, device = case.experience, torch.device("cpu")
    rows = list(range(len(e)))
    random = np.random.default_rng(len(e))
    random.shuffle(rows)
    cut = [rows[i : i + size] for i in range(0, len(rows), size)]
    minibatch = [cut[::2], cut[1::2]]
    bare = [[[r for r in part if r < case.counted] for part in own] for own in minibatch]
    bare = [[part for part in own if part] for own in bare]
    without = replace(e, fill=0)
    total = 0.0
    for own in minibatch:
        for part in own:
            weights = token_weights(e, minibatch, part, average, 9, device)
            kept = [r for r in part if r < case.counted]
            is_kept = torch.cat([torch.full((e.tokens([r]),), r < case.counted) for r in part])
            assert not weights[~is_kept].any()
            if kept:
                torch.testing.assert_close(
                    weights[is_kept], token_weights(without, bare, kept, average, 9, device)
                )
            total += float(weights.double().sum())
    counted = range(case.counted)
    whole = e.tokens(counted) / (9 * len(counted)) if average == "constant" else 1.0
    assert total == pytest.approx(whole, rel=1e-5)


def test_fill_is_in_no_metric() -> None:
    """Beyond every clip and far from the old policy, but of weight 0."""
    algorithm = make_algorithm(configured(algorithm={"name": "grpo"}, generation={"samples": 2}).algorithm)
    zero = torch.zeros(4)
    inputs = {"old_logprobs": zero, "ref_logprobs": zero, "advantages": torch.ones(4)}
    logprobs, weights = torch.tensor([0.5, 0.0, 3.0, 3.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    found = algorithm.loss("actor", Outputs(logprobs), inputs, weights, 0.1)
    sums = {f"actor.{name}": float(value) for name, value in found.sums.items()}
    assert sums["actor.tokens"] == 2
    metrics = algorithm.metrics(sums)
    assert metrics["clip_frac"] == 0.5
    assert metrics["approx_kl"] == pytest.approx((np.exp(0.5) - 1.5) / 2)


def test_a_minibatch_of_fill_alone_has_no_weight() -> None:
    e = replace(Case([[1, 2, 3], [4, 5, 6]], 0).experience, fill=2)
    for average in ("token", "sequence", "constant", "microbatch"):
        weights = token_weights(e, [[[0, 4], [2]]], [0, 4], average, 9, torch.device("cpu"))
        assert weights.tolist() == [0.0] * 6


@pytest.mark.parametrize("name", COMPARING)
def test_a_group_of_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="compares the samples of a prompt; give 2 or more"):
        configured(algorithm={"name": name}, generation={"samples": 1})
    config = configured(algorithm={"name": name}, generation={"samples": 2})
    alone = replace(Case([[1, 2, 3]], 0).experience, prompts=((1,),) * 3, prompt_ids=(0, 1, 2), samples=1)
    with pytest.raises(ValueError, match="group of one"):
        make_algorithm(config.algorithm).advantages(alone, torch.zeros(3), 0.1)


def test_those_that_compare_nothing_take_one_sample() -> None:
    for name in set(TRAINED) - set(COMPARING):
        assert configured(algorithm={"name": name}, generation={"samples": 1}).generation.samples == 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 20), st.floats(0.1, 5))
def test_overlong_rewards(lengths: list[int], buffer: int, penalty: float) -> None:
    config = configured(
        generation={"max_new_tokens": 20}, algorithm={"overlong": {"buffer": buffer, "penalty": penalty}}
    )
    responses = tuple((1,) * n for n in lengths)
    experience = Experience(((1,),) * len(lengths), tuple(range(len(lengths))), responses)
    expected = [numpy_ppo.overlong(n, 20, buffer, penalty) for n in lengths]
    rewards_B = overlong_rewards(experience, config)
    assert rewards_B is not None
    np.testing.assert_allclose(rewards_B.numpy(), expected, rtol=1e-6)
    scores_B = torch.arange(len(lengths), dtype=torch.float32)
    np.testing.assert_allclose(shaped(experience, scores_B, config).numpy(), scores_B + rewards_B)
    found = overlong_metrics(experience, config)
    assert found["overlong_reward"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["overlong_frac"] == pytest.approx(np.mean([n > 20 - buffer for n in lengths]))


def test_without_overlong_scores_stay() -> None:
    experience = Experience(((1,),), (0,), ((1,) * 5,))
    scores_B = torch.tensor([2.0])
    assert shaped(experience, scores_B, configured()) is scores_B
    assert overlong_metrics(experience, configured()) == {}
