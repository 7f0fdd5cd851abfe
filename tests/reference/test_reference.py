"""The reference itself, against transformers' own methods and arithmetic done by hand."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.reference import numpy_ppo
from tests.reference.hf_ppo import ReferencePPO, run_reference, token_values
from tests.reference.records import ReferenceConfig
from tests.reference.same_tokens import TokenAgreement, first_difference, same_tokens
from tests.reference.tiny import FAMILIES, save_lm, save_value

PROMPTS = [[5, 9, 200], [7, 7, 31, 99, 120, 3, 18], [250], [11, 12]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return [
        save_lm(root / "actor", seed=0),
        save_value(root / "critic", seed=1),
        save_lm(root / "reference", seed=2),
        save_value(root / "reward", seed=3),
    ]


def test_gae_by_hand():
    # delta = (1 + 1 - 0, 0 + 2 - 2, 3 + 0 - 4); advantages from the end: -1, -0.25, 1.9375
    advantages, returns = numpy_ppo.gae([1.0, 0.0, 3.0], [0.0, 2.0, 4.0], 0.5, 0.5)
    np.testing.assert_allclose(advantages, [1.9375, -0.25, -1.0])
    np.testing.assert_allclose(returns, [1.9375, 1.75, 3.0])


def test_rewards_by_hand():
    rows = numpy_ppo.rewards([[-1.0, -2.0], [-1.0]], [[-1.5, -1.0], [-1.0]], [9.0, -2.0], 0.1, 5.0, "k1")
    np.testing.assert_allclose(rows[0], [-0.05, 5.1])
    np.testing.assert_allclose(rows[1], [-2.0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_average_to_the_kl(estimator):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.33, 0.22])
    estimate = sum(p[i] * numpy_ppo.kl_estimate(np.log(p[i]), np.log(q[i]), estimator) for i in range(3))
    assert estimate == pytest.approx(
        float((p * np.log(p / q)).sum()), rel=0.05 if estimator == "k2" else 1e-12
    )


@pytest.mark.parametrize("name", ["policy", "value", "kl"])
def test_gradients_by_finite_differences(name):
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=5) * 0.3 for _ in range(3))
    losses = {
        "policy": lambda x: numpy_ppo.policy_loss([list(x)], [list(b)], [list(c)], 0.2),
        "value": lambda x: numpy_ppo.value_loss([list(x)], [list(b)], [list(c)], 0.2),
        "kl": lambda x: numpy_ppo.kl_loss([list(x)], [list(b)], "k3"),
    }
    loss = losses[name]
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        slope = (loss(a + step).value - loss(a - step).value) / 2e-6
        assert loss(a).gradient[0][i] == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_classifiers(tmp_path, family):
    folder = save_value(tmp_path / "m", family)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        official = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, 0]
        ours = token_values(model, PROMPTS[1])
    torch.testing.assert_close(ours[-1], official)
    assert ours.std() > 0.1  # the positions differ


def test_greedy_left_padding_does_not_matter(folders):
    ppo = ReferencePPO(*folders, ReferenceConfig(max_new_tokens=8))
    together = ppo.greedy(PROMPTS)
    assert together == [ppo.greedy([prompt])[0] for prompt in PROMPTS]
    assert together == ppo.sampled(PROMPTS, lambda row, position: torch.zeros(259))


def test_greedy_stops_at_the_end_of_text(folders):
    free = ReferencePPO(*folders, ReferenceConfig(max_new_tokens=8)).greedy(PROMPTS)
    eos = free[0][2]
    stopped = ReferencePPO(*folders, ReferenceConfig(max_new_tokens=8, eos_token_id=eos)).greedy(PROMPTS)
    for a, b in zip(free, stopped, strict=True):
        assert b == (a[: a.index(eos) + 1] if eos in a else a)
    assert len(stopped[0]) <= 3


def test_logprobs_against_transformers_scores(folders):
    ppo = ReferencePPO(*folders, ReferenceConfig(max_new_tokens=6, temperature=0.7))
    rollout = ppo.rollout(PROMPTS, ppo.greedy(PROMPTS))
    model = cast(Any, AutoModelForCausalLM.from_pretrained(folders[0]))
    for prompt, logprobs in zip(PROMPTS, rollout.logprobs, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = [
            float(torch.log_softmax(step[0] / 0.7, -1)[token])
            for step, token in zip(out.logits, out.sequences[0, len(prompt) :], strict=True)
        ]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_an_iteration(folders):
    config = ReferenceConfig(
        max_new_tokens=8, epochs=3, minibatches=lambda iteration, epoch: [[epoch, 3], [2, (epoch + 1) % 2]]
    )
    result = run_reference(*folders, prompts=PROMPTS, config=config)
    rollout = result.rollouts[0]
    assert rollout.ref_logprobs is not None
    assert [len(a) for a in rollout.advantages] == [len(r) for r in rollout.responses]
    assert rollout.rewards is not None
    assert rollout.rewards[1][-1] == pytest.approx(
        min(max(rollout.scores[1], -5), 5) - 0.1 * (rollout.logprobs[1][-1] - rollout.ref_logprobs[1][-1])
    )
    assert len(result.steps) == 6
    first = result.steps[0]
    # At the first step the ratio is 1: the loss is minus the mean advantage.
    flat = [a for row in first.rows for a in rollout.advantages[row]]
    assert first.losses["actor"] == pytest.approx(-np.mean(flat), rel=1e-5)
    assert set(first.grads["actor"]) == set(result.actor_weights)
    assert first.grads["critic"]["score.weight"].abs().max() > 0
    # The first optimizer step moves the value head against its clipped gradient, as Adam's first step does.
    before = AutoModelForSequenceClassification.from_pretrained(folders[1]).get_parameter("score.weight")
    single = run_reference(
        *folders, PROMPTS, ReferenceConfig(max_new_tokens=8), responses=[rollout.responses]
    )
    grad = single.steps[0].grads["critic"]["score.weight"] / max(1.0, single.steps[0].grad_norms["critic"])
    moved = before - 1e-4 * grad / (grad.abs() + 1e-4)
    torch.testing.assert_close(single.critic_weights["score.weight"], moved, atol=1e-7, rtol=0)


def test_microbatch_average_is_token_average_for_one_microbatch(folders):
    answers = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]

    def losses(**keys):
        config = ReferenceConfig(**keys)
        return run_reference(*folders, prompts=PROMPTS, config=config, responses=[answers]).steps[0]

    token, whole = losses(), losses(loss_average="microbatch", microbatch=4)
    halves = losses(loss_average="microbatch", microbatch=2)
    assert token.losses["actor"] == pytest.approx(whole.losses["actor"])
    assert abs(token.losses["actor"] - halves.losses["actor"]) > 1e-4


def test_same_tokens_rule():
    logits = torch.tensor([0.0, 1.0, 1.0 - 5e-5, 0.5])
    expected = [[1, 1, 1]] * 200
    got = [[1, 1, 1]] * 199 + [[1, 2, 0]]
    agreement = same_tokens(expected, got, lambda row, position: logits)
    assert (agreement.rows, agreement.near, agreement.wrong) == (200, 1, ())
    assert agreement.ok
    assert not same_tokens(expected[:100], got[100:], lambda row, position: logits).ok  # 1 % near ties
    assert (same_tokens(expected[:100], got[100:], lambda row, position: logits) + TokenAgreement(100)).ok
    far = same_tokens(expected, [[1, 1, 1]] * 199 + [[1, 3, 1]], lambda row, position: logits)
    assert not far.ok
    assert far.wrong == ((199, 1, 0.5),)
    assert same_tokens([[1, 1]], [[1]], lambda row, position: logits).wrong
    assert first_difference([1, 2], [1, 2]) is None
